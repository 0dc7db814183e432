package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/dstack-gw/dstack-gw/bench/backend"
	"github.com/dstack-gw/dstack-gw/bench/load"
)

// What the harness sends and receives is tested with real processes by package suite; here the client's side alone.
func client(t *testing.T, spec load.Spec, in io.Reader) []line {
	t.Helper()
	text, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := Main(context.Background(), ClientCommand, io.MultiReader(bytes.NewReader(append(text, '\n')), in), &out); err != nil {
		t.Fatal(err)
	}
	var lines []line
	for dec := json.NewDecoder(&out); dec.More(); {
		var l line
		if err := dec.Decode(&l); err != nil {
			t.Fatal(err)
		}
		lines = append(lines, l)
	}
	return lines
}

func TestClient(t *testing.T) {
	any := netip.MustParseAddrPort("127.0.0.1:0")
	s, err := backend.Start(backend.Addrs{RequestPassthrough: any, BulkPassthrough: any, RequestPlain: any, BulkPlain: any})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	spec := load.Spec{
		Kind: load.Requests, Addr: s.Addrs().RequestPassthrough, Name: "a.test", Conns: 2,
		Duration: 30 * time.Millisecond, Windows: []string{"quiet", "churn"},
	}
	lines := client(t, spec, strings.NewReader("\n"))
	if len(lines) != 2 || lines[0].Window == nil || *lines[0].Window != "churn" || lines[1].Result == nil || !lines[1].Bye {
		t.Fatalf("lines: %+v", lines)
	}
	if w := lines[1].Result.Windows; len(w) != 2 || w[1].Name != "churn" || w[1].Count == 0 {
		t.Errorf("windows: %+v", w)
	}

	// A harness that goes away instead of answering ends the run.
	lines = client(t, spec, strings.NewReader(""))
	if last := lines[len(lines)-1]; last.Result != nil || !strings.Contains(last.Error, "EOF") {
		t.Errorf("without an answer: %+v", last)
	}
}

func TestClientFails(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	to := l.Addr().(*net.TCPAddr).AddrPort()
	l.Close()
	lines := client(t, load.Spec{Kind: load.Bulk, Addr: to, Conns: 1, Duration: time.Millisecond}, strings.NewReader(""))
	if len(lines) != 1 || !lines[0].Bye || !strings.Contains(lines[0].Error, "refused") {
		t.Errorf("nobody listens: %+v", lines)
	}
	if err := Main(context.Background(), ClientCommand, strings.NewReader("{nonsense\n"), io.Discard); err == nil {
		t.Error("nonsense accepted as a case")
	}
	if err := Main(context.Background(), "spy", nil, io.Discard); err == nil {
		t.Error("unknown agent accepted")
	}
}
