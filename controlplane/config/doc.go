// Package config reads the gateway's configuration: files of every upstream generation, layered as upstream layers them,
// and the sections of our own.
//
// One table (table.go) holds every key with its default, type, age and meaning. Load decodes with it, Print renders with it
// and GenerateReference writes docs/reference/config.md from it, so the three cannot disagree.
//
// Guarantees: a file that started an upstream gateway loads; what is obsolete, unknown or risky in it is a Warning that names
// file, line and remedy; what cannot work is an error that lists all problems at once; secrets appear in no output.
// Non-goals: it opens no listener, reads no certificate and asks no kernel. Whether a feature works is decided at run time.
package config
