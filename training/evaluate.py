"""The paper's tables, one command each; each also runs on the demo world, so that anybody can.

    python -m training.evaluate world --model app/pretrained --clips 200 --budget 128 --out runs/world.json
    python -m training.evaluate world --model app/pretrained --budget 64 32 16 --compare uniform random ...
    python -m training.evaluate world --encoder runs/clip/encoder --alignment runs/clip --preset simple
    python -m training.evaluate retrieval --dataset msrvtt --encoder flux_b.pth --alignment clip.safetensors
    python -m training.evaluate action --dataset k400 ...     zero-shot, by prompts
    python -m training.evaluate classify --dataset ssv2 ...   by trained heads, clips x crops
    python -m training.evaluate mvbench --model DIR --annotations DIR --videos DIR
    python -m training.evaluate mvbench --model DIR --dataset world ...

Results go to --out with all they depend on, and items to a journal beside it, so that the same command goes
on after a stop; `accelerate launch -m training.evaluate ...` shares the items over GPUs (on CPUs, torchrun).
Videos that cannot be read are listed and left out. `world` and `mvbench` also run the language model without
the video.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from encoder.errors import ConfigError, FluxChatError
from training.evaluation.chat_runs import run_mvbench, run_world_chat
from training.evaluation.encoder_runs import run_action, run_classify, run_retrieval, run_world_encoder
from training.evaluation.options import parser


def run_world(args: argparse.Namespace) -> int:
    """The `world` command: a chat model, or an encoder alone."""
    if (args.model is None) == (args.encoder is None):
        raise ConfigError("Give either --model (a chat model) or --encoder with --alignment.")
    return run_world_chat(args) if args.encoder is None else run_world_encoder(args)


COMMANDS = {
    "world": run_world,
    "retrieval": run_retrieval,
    "action": run_action,
    "classify": run_classify,
    "mvbench": run_mvbench,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    given = sys.argv[1:] if argv is None else list(argv)
    args = parser(__doc__).parse_args(given)
    args.told = ["python", "-m", "training.evaluate", *given]
    try:
        return COMMANDS[args.command](args)
    except FluxChatError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
