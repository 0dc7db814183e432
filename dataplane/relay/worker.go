package relay

import (
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Gate says when a direction may move to splice(2).
type Gate struct {
	// Off keeps every connection in the copying mode.
	Off bool
	// Auto lets each direction decide by its traffic (two full buffers in a row).
	// When false, AfterBytes and AfterDuration (0 = unset) of the whole connection
	// decide; either opens the gate, and with neither it is open at once.
	Auto          bool
	AfterBytes    uint64
	AfterDuration int64 // ns
}

// Worker holds what the connections of one loop share. Not safe for concurrent use.
type Worker struct {
	Gate Gate
	// MaxPipes bounds the pipes that are open at a time, in use or pooled; 0 = no limit.
	MaxPipes int
	// Scratch is the copy buffer; its length is core.proxy.buffer_size.
	Scratch []byte

	// Copied and Spliced count bytes moved by either way, indexed by direction
	// (ToApp, ToClient); SpliceEngaged counts connections that moved to splice at
	// least once. Read from anywhere.
	Copied, Spliced [2]atomic.Uint64
	SpliceEngaged   atomic.Uint64
	// NoPipe counts the times that a pipe was wanted and the system gave none.
	NoPipe atomic.Uint64

	small  [][]byte
	chunks [][]byte
	pipes  []*pipe
	open   int // pipes that exist
}

// Directions of the byte counters.
const (
	ToApp    = 0
	ToClient = 1
)

const (
	pipeSize   = 1 << 20
	keepPipes  = 64
	keepChunks = 64
	smallChunk = 4096
	keepSmall  = 1024
	turnBudget = 1 << 20 // bytes one direction may move before others get a turn
)

// NewWorker returns a worker with a copy buffer of size bytes.
func NewWorker(size int, g Gate) *Worker {
	return &Worker{Gate: g, Scratch: make([]byte, max(size, 4096))}
}

// Chunk returns a pooled copy of p. Small pieces (a ClientHello) come from a class
// of their own, so that thousands of connections that wait hold 4 KiB each, not a whole buffer.
func (w *Worker) Chunk(p []byte) []byte {
	c := w.take(len(p))
	copy(c, p)
	return c
}

// Extend appends p to c, a whole buffer obtained from Chunk, and returns the result,
// which may be another buffer; c must not be used any more.
func (w *Worker) Extend(c, p []byte) []byte {
	n := len(c) + len(p)
	if n <= cap(c) {
		return append(c, p...)
	}
	big := w.take(max(n, 2*cap(c)))[:n] // doubled, or bytes that come one by one cost their square
	copy(big, c)
	copy(big[len(c):], p)
	w.PutChunk(c)
	return big
}

// take returns a pooled buffer of n bytes.
func (w *Worker) take(n int) []byte {
	var c []byte
	if n <= smallChunk {
		if k := len(w.small); k > 0 {
			c, w.small = w.small[k-1], w.small[:k-1]
		} else {
			c = make([]byte, smallChunk)
		}
	} else if k := len(w.chunks); k > 0 {
		c, w.chunks = w.chunks[k-1], w.chunks[:k-1]
	}
	if cap(c) < n {
		c = make([]byte, max(n, len(w.Scratch)))
	}
	return c[:n]
}

// PutChunk returns a buffer obtained from Chunk; the whole of it, not a tail slice.
func (w *Worker) PutChunk(c []byte) {
	switch {
	case cap(c) == smallChunk:
		if len(w.small) < keepSmall {
			w.small = append(w.small, c)
		}
	case cap(c) >= len(w.Scratch) && len(w.chunks) < keepChunks:
		w.chunks = append(w.chunks, c)
	}
}

type pipe struct{ r, w, size int }

func (w *Worker) pipe() *pipe {
	if n := len(w.pipes); n > 0 {
		p := w.pipes[n-1]
		w.pipes = w.pipes[:n-1]
		return p
	}
	if w.MaxPipes > 0 && w.open >= w.MaxPipes {
		w.NoPipe.Add(1)
		return nil
	}
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		w.NoPipe.Add(1)
		return nil
	}
	size := 65536
	if n, err := unix.FcntlInt(uintptr(fds[1]), unix.F_SETPIPE_SZ, pipeSize); err == nil {
		size = n
	}
	w.open++
	return &pipe{r: fds[0], w: fds[1], size: size}
}

func (w *Worker) putPipe(p *pipe) {
	if len(w.pipes) < keepPipes {
		w.pipes = append(w.pipes, p)
		return
	}
	w.closePipe(p)
}

func (w *Worker) closePipe(p *pipe) {
	unix.Close(p.r)
	unix.Close(p.w)
	w.open--
}

// Close releases pooled descriptors.
func (w *Worker) Close() {
	for _, p := range w.pipes {
		w.closePipe(p)
	}
	w.pipes = nil
}
