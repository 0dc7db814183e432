package soak

import (
	"errors"
	"fmt"
	"strings"
	"sync"
)

// Tally counts the connections of one kind at one end.
type Tally struct {
	Begun   uint64 `json:"begun"`
	Orderly uint64 `json:"orderly"` // both directions ended with verified totals
	Cut     uint64 `json:"cut"`     // reset or hasty, as planned; what had arrived was right
	// Sent and Received are payload bytes; all received ones were verified.
	Sent     uint64 `json:"sent"`
	Received uint64 `json:"received"`
	// IDs is the exclusive-or of the orderly connections' ids: both ends must have the same.
	IDs uint64 `json:"ids"`
}

// Side is what one end saw.
type Side struct {
	Kinds map[string]*Tally `json:"kinds"`
	// Nameless connections ended before they said what they are.
	Nameless uint64 `json:"nameless"`
	Open     int64  `json:"open"` // now
	Corrupt  uint64 `json:"corrupt"`
	Failed   uint64 `json:"failed"` // corrupt ones included
	// Errors are the first few reasons.
	Errors []string `json:"errors,omitempty"`
}

// maxErrors bounds the reasons kept.
const maxErrors = 12

// book keeps a Side.
type book struct {
	who string
	mu  sync.Mutex
	s   Side
}

func newBook(who string) *book { return &book{who: who, s: Side{Kinds: map[string]*Tally{}}} }

func (b *book) kind(k Kind) *Tally {
	t := b.s.Kinds[k.String()]
	if t == nil {
		t = &Tally{}
		b.s.Kinds[k.String()] = t
	}
	return t
}

func (b *book) begin(k Kind) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.kind(k).Begun++
}

func (b *book) opened(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.s.Open += n
}

func (b *book) open() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.s.Open
}

func (b *book) nameless() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.s.Nameless++
}

// fail notes a connection, or something else, that went wrong.
func (b *book) fail(what string, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.s.Failed++
	if errors.Is(err, ErrCorrupt) {
		b.s.Corrupt++
	}
	if len(b.s.Errors) < maxErrors {
		b.s.Errors = append(b.s.Errors, fmt.Sprintf("%s: %s: %s", b.who, what, strings.ReplaceAll(err.Error(), "\n", "; ")))
	}
}

// end notes how a connection ended: err is nil after an orderly one.
func (b *book) end(p *plan, sent, received uint64, err error) {
	b.mu.Lock()
	t := b.kind(p.kind)
	t.Sent += sent
	t.Received += received
	bad := err != nil && (p.kind.orderly() || errors.Is(err, ErrCorrupt))
	switch {
	case bad:
	case p.kind.orderly():
		t.Orderly++
		t.IDs ^= p.id
	default:
		t.Cut++
	}
	b.mu.Unlock()
	if bad {
		b.fail(fmt.Sprintf("connection %d.%d (%s)", p.id>>32, p.id&0xffffffff, p.kind), err)
	}
}

// side returns a copy.
func (b *book) side() Side {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.s
	s.Kinds = map[string]*Tally{}
	for k, t := range b.s.Kinds {
		c := *t
		s.Kinds[k] = &c
	}
	s.Errors = append([]string(nil), b.s.Errors...)
	return s
}
