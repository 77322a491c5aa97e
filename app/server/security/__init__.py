"""Who may use the server: authentication, API keys, the login form, and the middleware that enforces them."""
