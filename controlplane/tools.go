package controlplane

import "net/http"

// tools are the pages that the command line tools ask for.
func (g *Gateway) tools() map[string]http.Handler {
	return map[string]http.Handler{}
}
