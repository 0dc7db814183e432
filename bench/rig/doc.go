// Package rig builds the network the bench measures in and runs programs inside it:
//
//	client 10.98.0.2/24 --veth-- 10.98.0.1 gateway 10.99.0.1/16 --veth-- 10.99.0.2/16 backend
//
// three network namespaces, the middle one routing. Names are unique to the running harness; Close removes
// everything, programs are told to end when the harness dies, and Sweep removes what a killed one left behind.
// It needs root and the ip program (Debian package iproute2) and installs nothing.
// Non-goals: measuring (packages cpu and load), knowing any gateway (package arm).
package rig
