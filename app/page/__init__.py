"""The Gradio page: layout and events of the controls, their handlers, and the sessions of the visitors."""
