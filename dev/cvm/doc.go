// Package cvm is a CVM stand-in for development: it does in a network namespace
// what a released guest does inside a confidential VM, as far as a gateway can
// see it. It registers over mutual TLS, runs its end of the WireGuard tunnel,
// refreshes, answers the guest agent's Info, and runs ordinary servers.
//
// Guarantees: the gateway gets no help that a real guest would not give it; all
// that was started ends with Run; secrets stay in files of mode 0600.
//
// Non-goals: isolation (whoever is root outside is root inside), evidence, and
// the firewall of real guests.
package cvm
