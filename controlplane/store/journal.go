package store

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// The journal keeps writes that etcd could not take. It is one file of frames:
//
//	magic 4 | crc32c 4 | epoch 8 | length 4 | payload (JSON)        little-endian; the CRC covers all behind it
//
// The file is never truncated: emptying it means writing, at its start, a frame without payload and with the next
// epoch, which makes all older frames worthless. That keeps the blocks reserved, so that the journal can still be
// written when the disk is full. A reader takes the frames of the highest epoch and skips what does not check out.
const (
	journalHeader = 20
	// journalReserve is preallocated: about 10,000 registrations.
	journalReserve = 4 << 20
	// journalMax bounds the file; beyond it writes fail rather than fill the disk.
	journalMax = 256 << 20
)

// journalMagic starts with a byte that cannot occur in JSON, so that payload is never taken for a frame.
func journalMagic() [4]byte { return [4]byte{0xf7, 'd', 'g', 'j'} }

// journalEntry is a payload.
type journalEntry struct {
	Key    string          `json:"k"`
	At     int64           `json:"at"`
	Value  json.RawMessage `json:"v,omitempty"`
	Delete bool            `json:"del,omitempty"`
}

type journal struct {
	path    string
	file    *os.File
	epoch   uint64
	tail    int64
	written int64 // size of the file when it was last started anew
	// broken: a write or fsync failed, the state of the file is not known. The next append starts a new file.
	broken bool
}

func appendFrame(buf []byte, epoch uint64, payload []byte) []byte {
	magic := journalMagic()
	start := len(buf)
	buf = append(buf, magic[:]...)
	buf = append(buf, 0, 0, 0, 0)
	buf = binary.LittleEndian.AppendUint64(buf, epoch)
	buf = binary.LittleEndian.AppendUint32(buf, uint32(len(payload)))
	buf = append(buf, payload...)
	binary.LittleEndian.PutUint32(buf[start+4:], crc32.Checksum(buf[start+8:], crc32.MakeTable(crc32.Castagnoli)))
	return buf
}

// journalContent is what a journal file says.
type journalContent struct {
	ops   []op // in the order they were written
	epoch uint64
	tail  int64 // where the next frame belongs
	// damaged are bytes between good frames that belong to none: records were lost there. A torn last frame is normal
	// after a crash (it was never acknowledged) and not counted.
	damaged int64
}

func parseJournal(data []byte) journalContent {
	magic := journalMagic()
	table := crc32.MakeTable(crc32.Castagnoli)
	var c journalContent
	for at := 0; ; {
		skip := bytes.Index(data[at:], magic[:])
		if skip < 0 || len(data)-at-skip < journalHeader {
			return c
		}
		at += skip
		frame := data[at:]
		epoch := binary.LittleEndian.Uint64(frame[8:])
		size := int64(binary.LittleEndian.Uint32(frame[16:])) + journalHeader
		if size > int64(len(frame)) || crc32.Checksum(frame[8:size], table) != binary.LittleEndian.Uint32(frame[4:]) {
			at++
			continue
		}
		start := int64(at)
		at += int(size)
		if epoch < c.epoch {
			continue // left over from before the journal was last emptied
		}
		if epoch > c.epoch {
			c = journalContent{epoch: epoch}
		}
		c.damaged += start - c.tail
		c.tail = int64(at)
		if size == journalHeader {
			continue
		}
		var e journalEntry
		if json.Unmarshal(frame[journalHeader:size], &e) != nil || e.Key == "" || !e.Delete && len(e.Value) == 0 {
			c.damaged += size
			continue
		}
		o := op{key: e.Key, at: e.At, journaled: true}
		if !e.Delete {
			o.value = e.Value
		}
		c.ops = append(c.ops, o)
	}
}

// openJournal reads the journal at path, which need not exist.
func openJournal(path string) (*journal, journalContent, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, journalContent{}, fmt.Errorf("store: opening the journal: %w", err)
	}
	data, err := io.ReadAll(io.LimitReader(f, journalMax))
	if err != nil {
		f.Close()
		return nil, journalContent{}, fmt.Errorf("store: reading the journal %s: %w", path, err)
	}
	c := parseJournal(data)
	j := &journal{path: path, file: f, epoch: max(c.epoch, 1), tail: c.tail}
	reserve(f)
	return j, c, nil
}

// reserve preallocates. File systems without fallocate and full disks do without.
func reserve(f *os.File) {
	if st, err := f.Stat(); err == nil && st.Size() < journalReserve {
		_ = unix.Fallocate(int(f.Fd()), 0, 0, journalReserve)
	}
}

func (j *journal) frames(ops []op) ([]byte, error) {
	var buf []byte
	for _, o := range ops {
		payload, err := json.Marshal(journalEntry{Key: o.key, At: o.at, Value: o.value, Delete: o.value == nil})
		if err != nil {
			return nil, fmt.Errorf("store: encoding %s for the journal: %w", o.key, err)
		}
		buf = appendFrame(buf, j.epoch, payload)
	}
	return buf, nil
}

// append writes ops and returns when they are on disk. waiting gives all ops that the journal must hold besides; it is
// asked when a new file is started, after an error or to get rid of superseded records, and whole is true then.
func (j *journal) append(ops []op, waiting func() []op) (whole bool, err error) {
	if j.broken || j.file == nil {
		return true, j.rewrite(append(waiting(), ops...))
	}
	buf, err := j.frames(ops)
	if err != nil {
		return false, err
	}
	if j.tail+int64(len(buf)) > j.limit() {
		return true, j.rewrite(append(waiting(), ops...))
	}
	if _, err := j.file.WriteAt(buf, j.tail); err != nil {
		// The frames may be there in part. They are overwritten or ignored: the tail has not moved.
		return false, fmt.Errorf("store: writing the journal: %w", err)
	}
	if err := j.file.Sync(); err != nil {
		// After a failed fsync the kernel may have dropped the pages and report success next time.
		j.broken = true
		return false, fmt.Errorf("store: syncing the journal: %w", err)
	}
	j.tail += int64(len(buf))
	return false, nil
}

// limit is the size at which it is worth looking whether most of the file is superseded.
func (j *journal) limit() int64 { return min(max(2*journalReserve, 4*j.written), journalMax) }

// reset empties the journal.
func (j *journal) reset() error {
	if j.broken || j.file == nil {
		return j.rewrite(nil)
	}
	if j.tail == 0 {
		return nil
	}
	frame := appendFrame(nil, j.epoch+1, nil)
	if _, err := j.file.WriteAt(frame, 0); err != nil {
		return fmt.Errorf("store: emptying the journal: %w", err)
	}
	j.epoch++
	j.tail = int64(len(frame))
	if err := j.file.Sync(); err != nil {
		j.broken = true
		return fmt.Errorf("store: emptying the journal: %w", err)
	}
	return nil
}

// rewrite replaces the file by one that holds ops alone.
func (j *journal) rewrite(ops []op) error {
	next := &journal{path: j.path, epoch: j.epoch + 1}
	buf, err := next.frames(ops)
	if err != nil {
		return err
	}
	if len(buf) > journalMax {
		return fmt.Errorf("store: the journal is full: %d bytes wait for etcd, at most %d are kept", len(buf), journalMax)
	}
	tmp := j.path + ".tmp"
	f, err := os.OpenFile(tmp, os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("store: starting a new journal: %w", err)
	}
	reserve(f)
	_, err = f.WriteAt(buf, 0)
	err = errors.Join(err, f.Sync())
	if err == nil {
		err = os.Rename(tmp, j.path)
	}
	if err == nil {
		err = syncDir(filepath.Dir(j.path))
	}
	if err != nil {
		f.Close()
		return fmt.Errorf("store: starting a new journal: %w", err)
	}
	if j.file != nil {
		j.file.Close()
	}
	*j = journal{path: j.path, file: f, epoch: next.epoch, tail: int64(len(buf)), written: int64(len(buf))}
	return nil
}

func (j *journal) close() {
	if j.file != nil {
		j.file.Close()
		j.file = nil
	}
}

// syncDir makes renames in dir durable.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
