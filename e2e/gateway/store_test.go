package gateway

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// disk mounts a file system of its own at the gateway's data directory.
func disk(t *testing.T, g *gateway, mib int) {
	t.Helper()
	dir := g.path("data")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("mode=700,size=%dm", mib)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if g.proc != nil {
			g.kill()
		}
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

func remount(t *testing.T, g *gateway, flags uintptr, mib int) {
	t.Helper()
	if err := unix.Mount("tmpfs", g.path("data"), "tmpfs", unix.MS_REMOUNT|flags, fmt.Sprintf("size=%dm", mib)); err != nil {
		t.Fatal(err)
	}
}

// fill takes all space of the disk but keep bytes.
func fill(t *testing.T, g *gateway, keep int64) {
	t.Helper()
	f, err := os.OpenFile(g.path("data/ballast"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var size int64
	for range 100 { // the gateway takes and gives space meanwhile
		var st unix.Statfs_t
		if err := unix.Statfs(g.path("data"), &st); err != nil {
			t.Fatal(err)
		}
		more := int64(st.Bavail)*st.Bsize - keep
		if more <= 0 {
			return
		}
		if err := unix.Fallocate(int(f.Fd()), 0, size, more); err == nil {
			size += more
		}
	}
	t.Fatal("the disk does not get full")
}

// ledger is what guests were told.
type ledger struct {
	t    *testing.T
	g    *gateway
	port int // where pages answers for all of them with "app"
	ips  map[*guest]netip.Addr
}

// register registers n new guests.
func (l *ledger) register(what string, n int) {
	l.t.Helper()
	for i := range n {
		v := newGuest(l.t, fmt.Sprintf("%s %d", what, i))
		l.ips[v], _ = v.register(l.t, l.g)
	}
}

// check finds every registration in the gateway, with the address that the guest was told, and traffic to each.
func (l *ledger) check(what string) {
	l.t.Helper()
	state := l.g.debug("GetProxyState", "")
	for v, ip := range l.ips {
		if want := fmt.Sprintf(`{"instance_id":%q,"app_id":%q,"ip":%q,"public_key":%q,`, v.instance, v.app, ip, v.key.PublicKey()); !strings.Contains(state, want) {
			l.t.Errorf("%s: the registration of %s (%s) is lost", what, ip, v.instance)
		}
		if page, err := l.g.get(fmt.Sprintf("%s-%d", v.instance, l.port), 5*time.Second); err != nil || page != ip.String()+" app" {
			l.t.Errorf("%s: %s is not reached: %v %q", what, ip, err, page)
		}
	}
}

// stored waits until the store takes writes and nothing waits for it.
func (g *gateway) stored() {
	g.t.Helper()
	within(g.t, 40*time.Second, func() error {
		a, err := g.tryAdmin("GET", "/metrics", "")
		if err != nil {
			return err
		}
		for _, m := range []string{"store_writable{node_id=\"1\"} 1", "store_pending_writes{node_id=\"1\"} 0", "store_volatile_writes{node_id=\"1\"} 0"} {
			if !strings.Contains(a.body, "dstack_gateway_"+m+"\n") {
				return fmt.Errorf("not yet %s", m)
			}
		}
		return nil
	})
}

// TestDisk: what a gateway does about the disk it stands on. In every case it starts or keeps serving, and a registration
// that was acknowledged while the journal could be written survives kill -9.
func TestDisk(t *testing.T) {
	needMachine(t)
	pages(t, 8082, "app")

	t.Run("too small from the start", func(t *testing.T) {
		t.Parallel()
		g := newGateway(t, nil)
		l := &ledger{t, g, 8082, map[*guest]netip.Addr{}}
		disk(t, g, 24)
		g.start()
		g.logged("level=ERROR", "etcd cannot be opened", "MiB free", "192 MiB are needed", "no space left on device")
		l.register("small", 20)
		l.check("small disk")
		if a, err := g.tryAdmin("POST", "/prpc/AddZtDomain?json", `{"domain":"x.example","port":443}`); err != nil || a.status != 400 || !strings.Contains(a.body, "MiB are needed") {
			t.Errorf("an admin change without a store: %v %+v", err, a)
		}
		g.kill()
		g.start()
		l.check("small disk, after kill -9")
		g.kill()
		remount(t, g, 0, 600)
		g.start()
		g.stored()
		l.check("disk made larger")
		g.kill()
		g.start()
		l.check("disk made larger, after kill -9")
	})

	t.Run("full while running", func(t *testing.T) {
		t.Parallel()
		g := newGateway(t, nil)
		l := &ledger{t, g, 8082, map[*guest]netip.Addr{}}
		disk(t, g, 400)
		g.start()
		l.register("before", 5)
		g.admin("AddZtDomain", `{"domain":"kept.example","port":443}`)
		time.Sleep(2500 * time.Millisecond) // an admin change is in the backup a second later, and with it what was there before
		fill(t, g, 40<<20)
		g.logged("level=ERROR", "registrations go to the journal", "the disk is almost full", "Free some space")
		l.register("almost full", 10)
		fill(t, g, 0)
		l.register("full", 10)
		l.check("full disk")
		g.kill()
		g.start()
		l.check("full disk, after kill -9")
		l.register("full again", 5)
		g.kill()
		g.start()
		l.check("full disk, after another kill -9")
		if err := os.Remove(g.path("data/ballast")); err != nil {
			t.Fatal(err)
		}
		g.stored()
		l.check("space again")
		g.kill()
		g.start()
		l.check("space again, after kill -9")
	})

	t.Run("read-only", func(t *testing.T) {
		t.Parallel()
		g := newGateway(t, nil)
		l := &ledger{t, g, 8082, map[*guest]netip.Addr{}}
		disk(t, g, 600)
		g.start()
		l.register("before", 5)
		if code := g.stop(); code != 0 {
			t.Errorf("exit code %d", code)
		}
		remount(t, g, unix.MS_RDONLY, 600)
		g.start()
		g.logged("level=ERROR", "read-only file system")
		l.check("read-only")
		for v := range l.ips {
			if got, _ := v.register(t, g); got != l.ips[v] {
				t.Errorf("a refresh on a read-only disk moved %s to %s", l.ips[v], got)
			}
		}
		l.register("read-only", 5)
		g.logged("level=WARN", "in memory only")
		l.check("read-only, new registrations")
		remount(t, g, 0, 600)
		g.stored()
		g.kill()
		g.start()
		l.check("writable again, after kill -9")
	})

	for name, damage := range map[string]func(t *testing.T, store string){
		"database overwritten": func(t *testing.T, store string) {
			f, err := os.OpenFile(filepath.Join(store, "etcd/member/snap/db"), os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteAt(make([]byte, 64<<10), 0); err != nil {
				t.Fatal(err)
			}
		},
		"database cut": func(t *testing.T, store string) {
			if err := os.Truncate(filepath.Join(store, "etcd/member/snap/db"), 5000); err != nil {
				t.Fatal(err)
			}
		},
		"log overwritten": func(t *testing.T, store string) {
			logs, err := filepath.Glob(filepath.Join(store, "etcd/member/wal/*.wal"))
			if err != nil || len(logs) == 0 {
				t.Fatal(err, logs)
			}
			f, err := os.OpenFile(logs[0], os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteAt([]byte("this was never a write-ahead log"), 64); err != nil {
				t.Fatal(err)
			}
		},
		"database gone": func(t *testing.T, store string) {
			if err := os.RemoveAll(filepath.Join(store, "etcd")); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := startGateway(t, nil)
			l := &ledger{t, g, 8082, map[*guest]netip.Addr{}}
			l.register(name, 10)
			g.admin("AddZtDomain", `{"domain":"kept.example","port":443}`)
			if code := g.stop(); code != 0 {
				t.Errorf("exit code %d", code)
			}
			damage(t, g.path("data/store"))
			g.start()
			if name == "database gone" {
				g.logged("level=ERROR", "the etcd directory is missing but a backup is there", "stop the gateway and delete both")
			} else {
				g.logged("level=ERROR", "THE ETCD DATABASE IS DAMAGED", "Check the disk", "kept_as=")
			}
			l.check("damaged")
			if got := g.admin("ListZtDomains", ""); !strings.Contains(got, "kept.example") {
				t.Errorf("admin settings are lost: %s", got)
			}
			l.register("after", 3)
			g.kill()
			g.start()
			l.check("repaired, after kill -9")
		})
	}
}
