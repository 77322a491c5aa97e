"""The HTTP server: an OpenAI-compatible API and the Gradio page around one VideoChat.

A request passes, in this order:

    limits           number and time limits of connections (uvicorn protocol)
    security         middleware: checks the host, the origin, the API key or login, and the key's rate
    limits           middleware: bounds the bytes of all requests' bodies in memory
    routes           the handlers of the API;  gradio_mount: the page, for its own routes
    request_body     the body as strict JSON;  chat_request, schemas: validated as a ChatRequest
    scheduler        a bounded queue and worker threads; one job runs one answer
    media            what the request names, opened as files: uploads, data: URLs, downloads, the media root
    replies, errors  the answer as JSON or server-sent events, or an error in OpenAI's shape

`launch` puts them together and runs the process with the settings in `options`; `metrics` counts for
/metrics, `openapi` documents the API.
"""
