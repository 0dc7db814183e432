package dashboard

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"html/template"
	"math"
	"time"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
)

func funcs() template.FuncMap {
	return template.FuncMap{
		"hex":         func(b []byte) string { return hex.EncodeToString(b) },
		"fingerprint": fingerprint,
		"args":        args,
		"instant":     instant,
		"ago":         ago,
		"until":       until,
		"span":        span,
		"expiry":      expiry,
	}
}

func fingerprint(spki []byte) string {
	sum := sha256.Sum256(spki)
	return hex.EncodeToString(sum[:])
}

// args makes the JSON object that a button sends, from names and values in turn.
func args(pairs ...any) (string, error) {
	if len(pairs)%2 != 0 {
		return "", errors.New("args wants names and values in turn")
	}
	m := make(map[string]any, len(pairs)/2)
	for i := 0; i < len(pairs); i += 2 {
		name, ok := pairs[i].(string)
		if !ok {
			return "", errors.New("args wants a name at every second place")
		}
		m[name] = pairs[i+1]
	}
	b, err := json.Marshal(m)
	return string(b), err
}

// latest is the end of the year 9999: what lies behind is not a time but a mistake.
const latest = 253402300799

// instant renders seconds since the epoch.
func instant(unix uint64) string {
	if unix == 0 {
		return "never"
	}
	if unix > latest {
		return fmt.Sprintf("second %d", unix)
	}
	return time.Unix(int64(unix), 0).UTC().Format("2006-01-02 15:04:05Z")
}

// ago tells how long before now an instant was.
func ago(now time.Time, unix uint64) string {
	if unix == 0 || unix > latest {
		return instant(unix)
	}
	d := now.Sub(time.Unix(int64(unix), 0))
	if d < 0 {
		return "just now"
	}
	return span(uint64(d/time.Second)) + " ago"
}

// until tells how long after now an instant is.
func until(now time.Time, unix uint64) string {
	if unix == 0 || unix > latest {
		return instant(unix)
	}
	d := time.Unix(int64(unix), 0).Sub(now)
	if d <= 0 {
		return "expired"
	}
	return "in " + span(uint64(d/time.Second))
}

// span renders seconds coarsely: an operator wants the order of magnitude.
func span(seconds uint64) string {
	switch {
	case seconds == math.MaxUint64:
		return "for ever"
	case seconds < 120:
		return fmt.Sprintf("%d s", seconds)
	case seconds < 2*3600:
		return fmt.Sprintf("%d min", seconds/60)
	case seconds < 2*86400:
		return fmt.Sprintf("%d h", seconds/3600)
	default:
		return fmt.Sprintf("%d d", seconds/86400)
	}
}

// expiry is the class of a certificate: bad, soon (a week) or good.
func expiry(now time.Time, c *gatewaypb.ZtDomainCertStatus) string {
	left := int64(min(c.GetNotAfter(), latest)) - now.Unix()
	switch {
	case !c.GetHasCert() || left <= 0 || !c.GetLoadedInMemory():
		return "bad"
	case left < 7*86400:
		return "soon"
	default:
		return "good"
	}
}
