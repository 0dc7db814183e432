// Package rpc answers the gateway's three RPC services (gateway spec 3): Gateway for guests and peers, Admin for
// operators, Debug for tests, and the built-in endpoints of the proxy port (9.3).
//
// Guarantees: a registration that changes nothing costs no write and gives the same bytes; one that changes something is
// answered when its record is as durable as it can get and its tunnel was set up; registrations of different instances
// never wait for each other, and the store never keeps the older of two records of one. Error texts are those that
// released clients search in. Secrets are in no answer and no log.
//
// Non-goals: transport (prpc), authentication of operators (adminauth), issuing certificates, counters of other nodes.
package rpc
