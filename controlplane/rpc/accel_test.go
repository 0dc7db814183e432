package rpc

import (
	"testing"
	"time"

	"github.com/dstack-gw/dstack-gw/dataplane/relay"
)

func TestSpliceMode(t *testing.T) {
	for _, tc := range []struct {
		gate relay.Gate
		want string
	}{
		{relay.Gate{Off: true, Auto: true, AfterBytes: 5}, "off"},
		{relay.Gate{Auto: true, AfterBytes: 5}, "auto"},
		{relay.Gate{}, "immediate"},
		{relay.Gate{AfterBytes: 1}, "after 1 B"},
		{relay.Gate{AfterBytes: 1023}, "after 1023 B"},
		{relay.Gate{AfterBytes: 1024}, "after 1 KiB"},
		{relay.Gate{AfterBytes: 1025}, "after 1025 B"},
		{relay.Gate{AfterBytes: 65536}, "after 64 KiB"},
		{relay.Gate{AfterBytes: 1 << 20}, "after 1 MiB"},
		{relay.Gate{AfterBytes: 1<<20 + 1024}, "after 1025 KiB"},
		{relay.Gate{AfterBytes: 3 << 30}, "after 3072 MiB"},
		{relay.Gate{AfterDuration: int64(5 * time.Second)}, "after 5s"},
		{relay.Gate{AfterDuration: int64(500 * time.Millisecond)}, "after 500ms"},
		{relay.Gate{AfterDuration: int64(90 * time.Second)}, "after 90s"},
		{relay.Gate{AfterDuration: int64(1500 * time.Millisecond)}, "after 1.5s"},
		{relay.Gate{AfterDuration: int64(time.Second + time.Nanosecond)}, "after 1.000000001s"},
		{relay.Gate{AfterDuration: int64(1050 * time.Microsecond)}, "after 1.05ms"},
		{relay.Gate{AfterDuration: int64(2 * time.Microsecond)}, "after 2µs"},
		{relay.Gate{AfterDuration: 7}, "after 7ns"},
		{relay.Gate{AfterBytes: 2 << 20, AfterDuration: int64(2 * time.Hour)}, "after 2 MiB or 7200s"},
	} {
		if got := SpliceMode(tc.gate); got != tc.want {
			t.Errorf("%+v: %q, want %q", tc.gate, got, tc.want)
		}
	}
}
