package wireguard

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"
)

// fileEntry is one [Peer] group of the peer file.
type fileEntry struct {
	id        string // sorts the groups
	publicKey string // base64
	ip        string
}

// renderPeerFile returns the text of the peer file, byte for byte as gateway
// spec 6.3 has it: groups in ascending order of instance id, no Endpoint, no
// Address. privateKey is empty when none is configured. It sorts entries.
func renderPeerFile(privateKey string, listenPort int, entries []fileEntry) []byte {
	slices.SortFunc(entries, func(a, b fileEntry) int { return cmp.Compare(a.id, b.id) })
	var b bytes.Buffer
	b.Grow(128 + 128*len(entries))
	b.WriteString("[Interface]\nPrivateKey = ")
	b.WriteString(privateKey)
	b.WriteString("\nListenPort = ")
	b.WriteString(strconv.Itoa(listenPort))
	b.WriteString("\n\n")
	for _, e := range entries {
		b.WriteString("\n[Peer]\nPublicKey = ")
		b.WriteString(e.publicKey)
		b.WriteString("\nAllowedIPs = ")
		b.WriteString(e.ip)
		b.WriteString("/32\nPersistentKeepalive = 25\n")
	}
	return b.Bytes()
}

// writeFile replaces path with data, mode 0600: readers see the old or the new
// content, never a part. It does not sync to disk: both files of this package
// are rebuilt by a running gateway, and an fsync a second would compete with
// the store's.
func writeFile(path string, data []byte) error {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	// CreateTemp opens with mode 0600.
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

// runPeerFile writes the peer file soon after a change, at most once per
// FileInterval, until ctx ends.
func (d *Device) runPeerFile(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-d.fileDirty:
		}
		d.writePeerFile()
		select {
		case <-ctx.Done():
			return
		case <-time.After(d.opt.FileInterval):
		}
	}
}

func (d *Device) writePeerFile() {
	d.mu.Lock()
	peers := slices.Collect(maps.Values(d.want.byID))
	d.mu.Unlock()

	entries := make([]fileEntry, len(peers))
	for i, p := range peers {
		entries[i] = fileEntry{id: p.ID, publicKey: p.PublicKey.String(), ip: p.IP.String()}
	}

	var private string
	if d.opt.PrivateKey != zeroKey {
		private = d.opt.PrivateKey.String()
	}
	text := renderPeerFile(private, d.opt.ListenPort, entries)
	if bytes.Equal(text, d.fileWritten) {
		return
	}
	if err := writeFile(d.opt.ConfigPath, text); err != nil {
		d.met.fileFailures.Inc()
		d.fileLog.failed(fmt.Errorf("write the peer file %s: %w", d.opt.ConfigPath, err),
			"traffic is not affected: the device is configured directly")
		d.markFileDirty()
		return
	}
	d.fileLog.ok()
	d.fileWritten = text
	d.log.Debug("peer file written", slog.String("path", d.opt.ConfigPath), slog.Int("peers", len(entries)))
}

// markFileDirty asks for a rewrite. It never blocks.
func (d *Device) markFileDirty() {
	if d.opt.ConfigPath == "" {
		return
	}
	select {
	case d.fileDirty <- struct{}{}:
	default:
	}
}
