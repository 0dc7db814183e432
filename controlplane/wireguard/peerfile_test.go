package wireguard

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestRenderPeerFile(t *testing.T) {
	const head = "[Interface]\nPrivateKey = \nListenPort = 51820\n\n"
	for _, tc := range []struct {
		name    string
		private string
		port    int
		entries []fileEntry
		want    string
	}{
		{"gateway spec B.7, no peers", "", 51820, nil, head},
		{"gateway spec B.7, two peers", "", 51820,
			[]fileEntry{{"test-id-0", "test-pubkey-0", "10.0.0.2"}, {"test-id-1", "test-pubkey-1", "10.0.0.3"}},
			head +
				"\n[Peer]\nPublicKey = test-pubkey-0\nAllowedIPs = 10.0.0.2/32\nPersistentKeepalive = 25\n" +
				"\n[Peer]\nPublicKey = test-pubkey-1\nAllowedIPs = 10.0.0.3/32\nPersistentKeepalive = 25\n"},
		{"ascending order of id, bytewise", "cHJpdmF0ZQ==", 9182,
			[]fileEntry{{"b", "kb", "10.0.0.2"}, {"a", "ka", "10.0.0.9"}, {"B", "kB", "10.0.0.3"}},
			"[Interface]\nPrivateKey = cHJpdmF0ZQ==\nListenPort = 9182\n\n" +
				"\n[Peer]\nPublicKey = kB\nAllowedIPs = 10.0.0.3/32\nPersistentKeepalive = 25\n" +
				"\n[Peer]\nPublicKey = ka\nAllowedIPs = 10.0.0.9/32\nPersistentKeepalive = 25\n" +
				"\n[Peer]\nPublicKey = kb\nAllowedIPs = 10.0.0.2/32\nPersistentKeepalive = 25\n"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := string(renderPeerFile(tc.private, tc.port, tc.entries)); got != tc.want {
				t.Errorf("got\n%q\nwant\n%q", got, tc.want)
			}
		})
	}
}

// The file of a whole device: valid peers only, mode 0600, no leftovers, and
// few writes however many registrations there are.
func TestPeerFileIsLazyAndPrivate(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "new", "wg0.conf")
	synctest.Test(t, func(t *testing.T) {
		opt := testOptions()
		opt.ConfigPath = path
		d := openFake(t, opt, newFakeDevice(), &fakeLinks{})
		if err := d.Sync(t.Context(), []Peer{testPeer(2), testPeer(1)}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		want := "[Interface]\nPrivateKey = " + testPrivate.String() + "\nListenPort = 51820\n\n" +
			"\n[Peer]\nPublicKey = " + testKey(1).String() + "\nAllowedIPs = 10.8.0.1/32\nPersistentKeepalive = 25\n" +
			"\n[Peer]\nPublicKey = " + testKey(2).String() + "\nAllowedIPs = 10.8.0.2/32\nPersistentKeepalive = 25\n"
		if got := readFile(t, path); got != want {
			t.Fatalf("got\n%q\nwant\n%q", got, want)
		}
		if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
			t.Errorf("mode %v, error %v, want 0600", fi.Mode(), err)
		}

		var last os.FileInfo
		writes := 0
		for n := 10; n < 1010; n++ { // 1,000 registrations in two seconds
			if err := d.Upsert(testPeer(n)); err != nil {
				t.Fatal(err)
			}
			time.Sleep(2 * time.Millisecond)
			fi, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if last == nil || !os.SameFile(fi, last) {
				writes++
				last = fi
			}
		}
		if writes > 4 {
			t.Errorf("the file was replaced %d times in two seconds, want about one a second", writes)
		}
		settle()
		if got := strings.Count(readFile(t, path), "[Peer]"); got != 1002 {
			t.Errorf("the file has %d peers, want 1002", got)
		}

		// A record that changes nothing writes nothing.
		before, _ := os.Stat(path)
		if err := d.Upsert(testPeer(10)); err != nil {
			t.Fatal(err)
		}
		settle()
		if after, _ := os.Stat(path); !os.SameFile(before, after) {
			t.Error("an unchanged peer rewrote the file")
		}
	})
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 1 {
		t.Errorf("the directory holds %v, want the peer file alone (%v)", entries, err)
	}
}

// A change right before the end is in the file; one whose write failed is
// written when the disk works again.
func TestPeerFileSurvivesTrouble(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "sub", "wg0.conf")
	synctest.Test(t, func(t *testing.T) {
		opt := testOptions()
		opt.ConfigPath = path
		// A file where the directory should be.
		if err := os.WriteFile(filepath.Join(dir, "sub"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		d := openFake(t, opt, newFakeDevice(), &fakeLinks{})
		if err := d.Sync(t.Context(), testPeers(1, 3)); err != nil {
			t.Fatalf("an unwritable peer file failed Sync: %v", err)
		}
		settle()
		if err := os.Remove(filepath.Join(dir, "sub")); err != nil {
			t.Fatal(err)
		}
		settle()
		if got := strings.Count(readFile(t, path), "[Peer]"); got != 2 {
			t.Fatalf("the file has %d peers, want 2", got)
		}
		if err := d.Upsert(testPeer(3)); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if err := d.Upsert(testPeer(4)); err != nil { // within the second after a write
			t.Fatal(err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		if got := strings.Count(readFile(t, path), "[Peer]"); got != 4 {
			t.Fatalf("after Close the file has %d peers, want 4", got)
		}
	})
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(bytes.Clone(b))
}
