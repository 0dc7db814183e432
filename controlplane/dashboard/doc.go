// Package dashboard is the operator's page on the admin server (gateway spec 9.2): one page, three files, all embedded.
//
// Guarantees: everything is rendered and escaped by html/template on the server, whatever ids and names guests choose;
// the page loads nothing from elsewhere and its content security policy forbids inline scripts; a part of the gateway
// that fails shows its error in its own section. Without JavaScript the page is complete but read-only.
//
// Credentials: the listener authenticates every request, those for the script and the RPCs too. A browser that logged
// in with a password repeats it by itself. For a link with ?token=..., the page repeats the token in the addresses of
// its script and style, and the script sends it as X-Admin-Token. It is kept nowhere.
//
// Non-goals: history, graphs (Grafana has them), and any function that the Admin RPCs do not offer.
package dashboard
