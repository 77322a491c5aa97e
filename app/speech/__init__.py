"""What is said in a video: `transcript` holds lines with times, `listener` makes them by faster-whisper
(extra `speech`), `weights` fetches its model, `command` is `fluxchat transcribe`.
"""
