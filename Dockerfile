# docker build -t fluxchat .                                     without a GPU
# docker build -t fluxchat --build-arg VARIANT=cuda .            NVIDIA GPUs; run it with --gpus all
# docker run -p 7860:7860 -e FLUXCHAT_AUTH=ann:secret fluxchat   the page at http://127.0.0.1:7860
#
# Options of `fluxchat web` go behind the image's name; -v fluxchat:/cache keeps what is fetched and measured.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

# cpu: the build of torch without CUDA, gigabytes smaller. cuda: the usual one, which brings its libraries.
ARG VARIANT=cpu
ARG CPU_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /fluxchat
COPY constraints-cpu.txt ./
RUN case "$VARIANT" in \
      cpu) pip install --index-url "$CPU_INDEX" -r constraints-cpu.txt ;; \
      cuda) pip install torch ;; \
      *) echo "VARIANT must be cpu or cuda, not $VARIANT." >&2; exit 1 ;; \
    esac

COPY pyproject.toml README.md LICENSE NOTICE fluxchat.py ./
COPY encoder encoder
COPY llm_bridge llm_bridge
COPY training training
COPY app app
RUN pip install . && rm -rf build ./*.egg-info

# What strangers send is decoded by a user that owns nothing.
RUN useradd --create-home --uid 1000 fluxchat && install -d -o fluxchat /cache
ENV FLUXCHAT_CACHE=/cache HF_HOME=/cache/hub
USER fluxchat
WORKDIR /home/fluxchat
RUN fluxchat fetch
VOLUME /cache

EXPOSE 7860
HEALTHCHECK --start-period=120s --interval=30s --timeout=5s \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:7860/healthz', timeout=4)"]
# Reachable from outside, it asks for a login: set FLUXCHAT_AUTH, and FLUXCHAT_API_KEY for programs.
ENTRYPOINT ["fluxchat", "web", "--host", "0.0.0.0", "--no-browser"]
