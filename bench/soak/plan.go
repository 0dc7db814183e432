package soak

import (
	"fmt"
	"math/rand/v2"
	"time"
)

// Kind is the temper of a connection.
type Kind uint8

// Kinds.
const (
	Requests     Kind = iota // small requests and answers with pauses
	Quiet                    // a request, a long silence, a request
	SlowClient               // the app has much to say, the client's buffer is tiny and it reads a little now and then
	SlowApp                  // the other way round
	Bulk                     // bursts both ways at once
	ClientFirst              // the client ends its direction, then the app goes on for a while
	AppFirst                 // the other way round
	ClientResets             // traffic both ways until the client resets
	AppResets                // the other way round
	Hasty                    // closed or reset at once, at various points of the beginning
	Stalled                  // both ends send much and stop reading after a while (not in the mix, see pressure)
	kindCount
)

var kindNames = [kindCount]string{"requests", "quiet", "slow client", "slow app", "bulk", "client ends first",
	"app ends first", "client resets", "app resets", "hasty", "stalled"}

func (k Kind) String() string {
	if k < kindCount {
		return kindNames[k]
	}
	return fmt.Sprintf("kind %d", uint8(k))
}

// orderly kinds must end with verified totals at both ends.
func (k Kind) orderly() bool { return k != ClientResets && k != AppResets && k != Hasty }

// weights of the mix: how often each kind begins. Kinds live for different times, so their shares of the open
// connections differ.
var weights = [kindCount]int{
	Requests: 34, Quiet: 20, SlowClient: 9, SlowApp: 6, Bulk: 9, ClientFirst: 7, AppFirst: 7, ClientResets: 4, AppResets: 4, Hasty: 3,
}

func chooseKind(r *rand.Rand) Kind {
	total := 0
	for _, w := range weights {
		total += w
	}
	n := r.IntN(total)
	for k, w := range weights {
		if n < w {
			return Kind(k)
		}
		n -= w
	}
	return Requests
}

// step of a script: wait, then send.
type step struct {
	pause time.Duration
	bytes int
	// afterPeer waits first until the other direction has ended.
	afterPeer bool
}

// request of the asking kinds.
type request struct {
	send, want int
	pause      time.Duration // after the answer
}

// plan of one connection; both ends derive the same from kind, id and seed.
type plan struct {
	kind     Kind
	id       uint64
	requests []request // Requests, Quiet: the client asks these

	client, app []step        // others: what each end sends; repeated by the resetting kinds
	slow        time.Duration // SlowClient, SlowApp: how long that end reads slowly
	free        int           // Stalled: bytes each end reads before it stops for slow
	reset       time.Duration // ClientResets, AppResets: when
	haste       int           // Hasty: where to stop, 0 to 4
}

func newPlan(k Kind, id, seed uint64) plan {
	r := rand.New(rand.NewPCG(seed, id))
	p := plan{kind: k, id: id}
	ms := func(lo, hi int) time.Duration { return time.Duration(lo+r.IntN(hi-lo)) * time.Millisecond }
	burst := func(n, lo, hi int, pause func() time.Duration) (s []step) {
		for range n {
			s = append(s, step{pause: pause(), bytes: lo + r.IntN(hi-lo)})
		}
		return s
	}
	short := func() time.Duration { return ms(100, 1500) }
	long := func() time.Duration { return ms(500, 4000) }
	none := func() time.Duration { return 0 }
	switch k {
	case Requests:
		for range 6 + r.IntN(20) {
			p.requests = append(p.requests, request{send: 16 + r.IntN(1000), want: 16 + r.IntN(3000), pause: ms(200, 2500)})
		}
	case Quiet:
		p.requests = []request{{64, 64, ms(8000, 30000)}, {64, 64, 0}}
	case SlowClient:
		p.client, p.app = burst(1, 32, 500, none), burst(1, 192<<10, 448<<10, none)
		p.slow = ms(3000, 12000)
	case SlowApp:
		p.client, p.app = burst(1, 192<<10, 448<<10, none), burst(1, 32, 500, none)
		p.slow = ms(3000, 12000)
	case Bulk:
		p.client, p.app = burst(2+r.IntN(3), 8<<10, 256<<10, long), burst(2+r.IntN(3), 8<<10, 256<<10, long)
	case ClientFirst:
		p.client = burst(1+r.IntN(2), 16, 40<<10, short)
		p.app = append(burst(1, 16, 20<<10, short), step{afterPeer: true})
		p.app = append(p.app, burst(3+r.IntN(5), 16, 60<<10, short)...)
	case AppFirst:
		p.app = burst(1+r.IntN(2), 16, 40<<10, short)
		p.client = append(burst(1, 16, 20<<10, short), step{afterPeer: true})
		p.client = append(p.client, burst(3+r.IntN(5), 16, 60<<10, short)...)
	case ClientResets, AppResets:
		gap := func() time.Duration { return ms(0, 1200) }
		p.client, p.app = burst(3, 16, 40<<10, gap), burst(3, 16, 40<<10, gap)
		p.reset = ms(0, 9000)
	case Hasty:
		p.haste = r.IntN(5)
	case Stalled:
		p.client, p.app = burst(1, 1536<<10, 1537<<10, none), burst(1, 1536<<10, 1537<<10, none)
		p.free = 512 << 10
	}
	return p
}
