package cvm

import (
	"encoding/json"
	"fmt"
	"os"
	"time"
)

// Status is what a CVM writes to its status.json whenever it changes.
type Status struct {
	Name string `json:"name"`
	PID  int    `json:"pid"`
	// Mode is kernel or userspace, Reason why; empty before the tunnel is up.
	Mode   string `json:"mode"`
	Reason string `json:"reason"`
	// ClientIP is the address in the tunnel, empty before the first registration.
	ClientIP string `json:"client_ip"`
	// Registrations counts the successful ones, Failures the others.
	Registrations int `json:"registrations"`
	Failures      int `json:"failures"`
	// Registered is when the last one succeeded, Handshake the newest with a
	// gateway; zero for never.
	Registered time.Time `json:"registered"`
	Handshake  time.Time `json:"handshake"`
	// Error is the last failure of registration or tunnel, empty after a success.
	Error string `json:"error"`
	// Nginx is empty while nginx runs, else why it does not.
	Nginx string `json:"nginx"`
}

// ReadStatus reads a status.json. The file is not there before the CVM has
// started.
func ReadStatus(path string) (*Status, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	s := new(Status)
	if err := json.Unmarshal(text, s); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}

// write replaces the file. A reader sees the old one or the new.
func (s *Status) write(path string) error {
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}
	tmp := path + ".new"
	if err := os.WriteFile(tmp, append(text, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}
