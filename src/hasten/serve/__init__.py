"""Text protocols over `hasten.Engine`: an ASGI app, and the server that runs it. Needs the extra `serve`."""
