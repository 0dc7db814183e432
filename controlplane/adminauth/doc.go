// Package adminauth lets operators, and nobody else, use the admin server (gateway spec 9.1).
//
// Guarantees: without a configured credential there is no Authenticator (New fails closed); every request of every
// method and path is judged before routing; secrets are compared as digests in constant time and removed from the
// request, so that nothing behind it can log them; guessing htpasswd passwords cannot take more than a fixed share of
// the CPU; a page of another site cannot use the password that a browser remembers.
//
// Non-goals: users with different rights, sessions, and limiting who can reach the listener.
package adminauth
