package relay

import (
	"bytes"
	"math/rand/v2"
	"testing"
)

// Buffers that are in use at the same time never share memory, whatever the order of
// Chunk, Extend and PutChunk, and keep what was written to them.
func TestChunksAreDisjoint(t *testing.T) {
	for _, size := range []int{4096, 16 << 10} {
		rng := rand.New(rand.NewPCG(uint64(size), 3))
		w := NewWorker(size, Gate{})
		type owned struct{ c, want []byte }
		var all []owned
		fill := func(n int) []byte {
			return bytes.Repeat([]byte{byte(rng.Uint32())}, n)
		}
		for round := range 600 {
			switch k := rng.IntN(len(all) + 2); {
			case k >= len(all):
				b := fill(1 + rng.IntN(3*size/2))
				if rng.IntN(2) == 0 {
					b = b[:1+rng.IntN(min(len(b), 6000))]
				}
				all = append(all, owned{w.Chunk(b), b})
			case rng.IntN(2) == 0 && len(all[k].c) < 4*size:
				b := fill(1 + rng.IntN(500))
				all[k] = owned{w.Extend(all[k].c, b), append(all[k].want[:len(all[k].want):len(all[k].want)], b...)}
			default:
				clear(all[k].c[:cap(all[k].c)]) // the next owner of it must not mind
				w.PutChunk(all[k].c)
				all = append(all[:k], all[k+1:]...)
			}
			for i, o := range all {
				if !bytes.Equal(o.c, o.want) {
					t.Fatalf("buffer size %d, round %d: chunk %d changed under its owner", size, round, i)
				}
			}
			if len(all) > 40 {
				w.PutChunk(all[0].c)
				all = all[1:]
			}
		}
	}
}

// A hello that comes byte by byte is copied a few times, not once a byte.
func TestExtendDoubles(t *testing.T) {
	w := NewWorker(4096, Gate{})
	n := testing.AllocsPerRun(5, func() {
		c := w.Chunk([]byte{1})
		for range 18 << 10 {
			c = w.Extend(c, []byte{2})
		}
		w.PutChunk(c)
	})
	if n > 5 {
		t.Errorf("%v allocations", n)
	}
}

// Beyond the limit a direction is told to copy; a pipe that comes back is used again.
func TestMaxPipes(t *testing.T) {
	w := NewWorker(4096, Gate{})
	w.MaxPipes = 2
	defer w.Close()
	a, b := w.pipe(), w.pipe()
	if a == nil || b == nil || w.pipe() != nil || w.NoPipe.Load() != 1 {
		t.Fatalf("pipes %v %v, %d refused", a, b, w.NoPipe.Load())
	}
	w.putPipe(a)
	if c := w.pipe(); c != a {
		t.Errorf("got %v, want the pooled one", c)
	}
	w.closePipe(a)
	if c := w.pipe(); c == nil {
		t.Error("a closed pipe still counts")
	} else {
		w.closePipe(c)
	}
	w.closePipe(b)
	if w.open != 0 {
		t.Errorf("%d pipes are counted as open", w.open)
	}
}
