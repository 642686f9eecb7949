"""A reward behind a server: the protocol, the client (``reward.kind: http``) and the server."""
