package adminauth

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/crypto/bcrypt"
)

// Htpasswd is a set of users with bcrypt hashes.
type Htpasswd struct {
	hashes map[string][]byte
}

// maxHtpasswd bounds the file: it is read whole and lists people.
const maxHtpasswd = 1 << 20

// LoadHtpasswd reads an Apache htpasswd file, once: edits need a restart.
func LoadHtpasswd(path string) (*Htpasswd, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("failed to read the htpasswd file of core.admin.htpasswd_file: %w", err)
	}
	defer f.Close()
	h, err := ReadHtpasswd(f)
	if err != nil {
		return nil, fmt.Errorf("failed to read the htpasswd file %s: %w", path, err)
	}
	return h, nil
}

// ReadHtpasswd reads lines of user:hash. Blank lines and lines that begin with # are skipped; of two lines for one user
// the later wins. Only bcrypt ($2a$, $2b$, $2y$) is accepted, and at least one user must be there.
func ReadHtpasswd(r io.Reader) (*Htpasswd, error) {
	h := &Htpasswd{hashes: make(map[string][]byte)}
	lines := bufio.NewScanner(io.LimitReader(r, maxHtpasswd+1))
	lines.Buffer(nil, 64<<10)
	read := 0
	for n := 1; lines.Scan(); n++ {
		if read += len(lines.Bytes()) + 1; read > maxHtpasswd {
			return nil, fmt.Errorf("the file is larger than %d bytes", maxHtpasswd)
		}
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		user, hash, ok := strings.Cut(line, ":")
		if !ok || user == "" {
			return nil, fmt.Errorf("line %d is not of the form user:hash", n)
		}
		if !isBcrypt(hash) {
			return nil, fmt.Errorf("line %d: the password of user %q is not a bcrypt hash; make one with `htpasswd -B`", n, user)
		}
		h.hashes[user] = []byte(hash)
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	if len(h.hashes) == 0 {
		return nil, errors.New("there is no user in it; add one with `htpasswd -B`")
	}
	return h, nil
}

// isBcrypt also demands the length: a truncated hash would be found out at the first login only.
func isBcrypt(hash string) bool {
	if len(hash) != 60 {
		return false
	}
	switch hash[:4] {
	case "$2a$", "$2b$", "$2y$":
	default:
		return false
	}
	_, err := bcrypt.Cost([]byte(hash))
	return err == nil
}
