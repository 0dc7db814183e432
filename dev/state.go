package dev

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dstack-gw/dstack-gw/ratls"
)

// state names the files of an environment. The directory itself may be listed
// and read by everybody, since curl needs the web CA's certificate; all secrets
// are below private, mode 0700.
type state struct{ dir string }

func (s state) webCA() string { return filepath.Join(s.dir, "web-ca.crt") }
func (s state) facts() string { return filepath.Join(s.dir, "dev.json") }
func (s state) private(p ...string) string {
	return filepath.Join(append([]string{s.dir, "private"}, p...)...)
}
func (s state) gateway(file string) string { return s.private("gateway", file) }
func (s state) cvm(name string) string     { return s.private("cvm", name) }
func (s state) log(process string) string  { return s.private("log", process+".log") }
func (s state) record(process string) string {
	return s.private("run", process+".json")
}

// ours says whether the directory belongs to dstack dev: Down removes what is in
// it. The lock is the first file and the last.
func (s state) ours() bool {
	_, err := os.Lstat(s.private("lock"))
	return err == nil
}

// create makes the directories. A directory with files of others is refused.
func (s state) create() error {
	if there, err := os.ReadDir(s.dir); err == nil && len(there) > 0 && !s.ours() {
		return fmt.Errorf("state directory %s holds files that dstack dev did not make: give one of its own with --state", s.dir)
	}
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		return fmt.Errorf("create the state directory: %w", err)
	}
	for _, d := range []string{"", "gateway", "cvm", "log", "run", "ca"} {
		if err := os.MkdirAll(s.private(d), 0o700); err != nil {
			return fmt.Errorf("create the state directory: %w", err)
		}
	}
	return nil
}

// lock keeps a second command out. The lock ends with the process or with
// unlock.
func (s state) lock() (unlock func(), err error) {
	f, err := os.OpenFile(s.private("lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the state directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("another dstack dev command works on %s: wait for it to end", s.dir)
		}
		return nil, fmt.Errorf("lock the state directory: %w", err)
	}
	return func() { f.Close() }, nil
}

// saved is the options of the environment that is there, nil without one.
func (s state) saved() (*Options, error) {
	text, err := os.ReadFile(s.private("options.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the environment's options: %w", err)
	}
	o := new(Options)
	if err := json.Unmarshal(text, o); err != nil {
		return nil, fmt.Errorf("read the environment's options %s: %w", s.private("options.json"), err)
	}
	return o, nil
}

func (s state) save(o *Options) error {
	text, err := json.MarshalIndent(o, "", "  ")
	if err != nil {
		return err
	}
	return ratls.WriteFile(s.private("options.json"), text)
}

// secret is a random text that is made once, at least 128 bits.
func (s state) secret(path string) (string, error) {
	text, err := os.ReadFile(path)
	if err == nil && len(text) > 0 {
		return strings.TrimSpace(string(text)), nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("read a secret: %w", err)
	}
	secret := rand.Text()
	return secret, ratls.WriteFile(path, []byte(secret+"\n"))
}

// Facts is what everybody may know of a running environment; it is dev.json.
type Facts struct {
	BaseDomain string `json:"base_domain"`
	Proxy      string `json:"proxy"`
	WebCA      string `json:"web_ca"`
	Lines      []Line `json:"lines"`
}

// ReadFacts tells about the environment in a state directory.
func ReadFacts(dir string) (*Facts, error) {
	path := state{dir}.facts()
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("nothing is up in %s: run \"dstack dev up\" first", dir)
	}
	if err != nil {
		return nil, err
	}
	f := new(Facts)
	if err := json.Unmarshal(text, f); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return f, nil
}
