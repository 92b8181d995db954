"""One file an endpoint family; `server.app` lists them."""
