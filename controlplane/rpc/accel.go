package rpc

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/dstack-gw/dstack-gw/dataplane/relay"
)

// What Status says about kTLS.
const (
	KTLSOff = "off"
	// KTLSNoULP: it is configured, but the kernel cannot do it.
	KTLSNoULP = "disabled (kernel has no TLS ULP)"
)

// SpliceMode says in the words of gateway spec 3.3 when connections move to splice(2): "off", "immediate", "after 64 KiB",
// "after 5s", "after 1 MiB or 5s", or "auto" where traffic decides.
func SpliceMode(g relay.Gate) string {
	switch {
	case g.Off:
		return "off"
	case g.Auto:
		return "auto"
	}
	var gates []string
	if g.AfterBytes > 0 {
		gates = append(gates, byteCount(g.AfterBytes))
	}
	if g.AfterDuration > 0 {
		gates = append(gates, duration(time.Duration(g.AfterDuration)))
	}
	if len(gates) == 0 {
		return "immediate"
	}
	return "after " + strings.Join(gates, " or ")
}

// byteCount uses a binary unit only if it divides n.
func byteCount(n uint64) string {
	switch {
	case n%(1<<20) == 0:
		return fmt.Sprintf("%d MiB", n>>20)
	case n%(1<<10) == 0:
		return fmt.Sprintf("%d KiB", n>>10)
	default:
		return fmt.Sprintf("%d B", n)
	}
}

// duration has one unit, the largest that leaves a whole part, and as many decimals as needed: 90s, 1.5s, 500ms.
func duration(d time.Duration) string {
	unit, name := time.Nanosecond, "ns"
	switch {
	case d >= time.Second:
		unit, name = time.Second, "s"
	case d >= time.Millisecond:
		unit, name = time.Millisecond, "ms"
	case d >= time.Microsecond:
		unit, name = time.Microsecond, "µs"
	}
	text := strconv.FormatInt(int64(d/unit), 10)
	if rest := d % unit; rest > 0 {
		digits := len(strconv.FormatInt(int64(unit), 10)) - 1
		text += "." + strings.TrimRight(fmt.Sprintf("%0*d", digits, int64(rest)), "0")
	}
	return text + name
}
