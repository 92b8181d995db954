"""One file an endpoint family; `fptq_server.app` lists them."""
