// Package looptest helps the tests of packages that run on an event loop: a loop
// that ends with the test, TCP connections of which one end is a loop.Sock, and a
// count of the descriptors of the process.
//
// Non-goal: use outside of tests; every failure ends the test.
package looptest
