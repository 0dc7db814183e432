package certs

import (
	"crypto/tls"
	"fmt"
	"os"
)

// loadPair reads a chain and its key from files.
func loadPair(certPath, keyPath string) (*tls.Certificate, error) {
	certPEM, err := readPEM(certPath)
	if err != nil {
		return nil, err
	}
	keyPEM, err := readPEM(keyPath)
	if err != nil {
		return nil, err
	}
	pair, err := parsePair(certPEM, keyPEM)
	if err != nil {
		return nil, fmt.Errorf("%s with %s: %w", certPath, keyPath, err)
	}
	return pair, nil
}

func readPEM(path string) ([]byte, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if fi.Size() > maxPEM {
		return nil, fmt.Errorf("%s has %d bytes, at most %d are read", path, fi.Size(), maxPEM)
	}
	return os.ReadFile(path)
}
