// Package api holds the interfaces of the daemons: one folder a service with
// its .proto file and the Go code generated from it.
//
// Guarantee: names and numbers are those that released guests, gateways and
// tools use, and generated code is committed and matches its .proto (a test
// regenerates and compares). Non-goal: transport; package prpc carries these
// messages, over HTTP and with its own JSON mapping.
package api

//go:generate ./generate.sh
