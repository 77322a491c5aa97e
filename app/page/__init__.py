"""The Gradio page: layout and events of the controls, their handlers, and the sessions of the visitors."""

from app.page import gradio_import as gradio_import  # first: what comes later finds Gradio imported
