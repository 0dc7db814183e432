package dataplane

import (
	"time"

	"github.com/dstack-gw/dstack-gw/dataplane/loop"
)

const (
	// cutOffLimit is how long a peer may take to receive what is left for it.
	cutOffLimit = 5 * time.Second
	cutOffLook  = 50 * time.Millisecond
)

// cutOff resets the peer of s, whose counterpart failed, once all that was written to
// s has been sent. A reset at once would lose bytes that came whole; a FIN would make
// them look like all there was.
func (w *worker) cutOff(s *loop.Sock) {
	if s.FD < 0 || s.Unsent() == 0 {
		s.Reset(w.l)
		return
	}
	l := &leaving{w: w, sock: *s, until: w.l.Now() + int64(cutOffLimit)}
	*s = loop.Sock{FD: -1}
	l.tm.H = l
	w.leaving[l] = struct{}{}
	w.l.Arm(&l.tm, cutOffLook)
}

// leaving is a socket that waits for its reset. It belongs to no connection any more.
type leaving struct {
	w     *worker
	sock  loop.Sock
	tm    loop.Timer
	until int64
}

// Expired implements loop.TimerHandler.
func (l *leaving) Expired(*loop.Timer) {
	if l.sock.Unsent() > 0 && l.w.l.Now() < l.until {
		l.w.l.Arm(&l.tm, cutOffLook)
		return
	}
	l.end()
}

func (l *leaving) end() {
	l.w.l.Disarm(&l.tm)
	l.sock.Reset(l.w.l)
	delete(l.w.leaving, l)
}
