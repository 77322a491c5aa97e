"""The HTTP server: an OpenAI-compatible API and the Gradio page around one VideoChat.

A request passes, in this order:

    limits           the connection's time limits (uvicorn protocol), then the bytes of its body (middleware)
    security         access control (middleware): host, origin, API key or login, the key's rate
    routes           the handlers of the API;  gradio_mount: the page, for its own routes
    request_body     the body as strict JSON;  chat_request, schemas: validated as a ChatRequest
    scheduler        a bounded queue and worker threads; one job runs one answer
    media            what the request names, opened as files: uploads, data: URLs, downloads, the media root
    replies, errors  the answer as JSON or server-sent events, or an error in OpenAI's shape

`launch` puts them together and runs the process, as `options` says; `metrics` counts for /metrics, `openapi` documents the API.
"""
