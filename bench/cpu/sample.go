package cpu

import (
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// kthreadd is the parent of all kernel threads. Their work (ksoftirqd, kworkers) belongs to the traffic.
const kthreadd = 2

// Groups names the processes to tell apart by the root of their process tree; 0 means there is none.
type Groups struct {
	Bench   int `json:"bench"`   // the harness: everything below it is not foreign
	Gateway int `json:"gateway"` // counted with all descendants
	Client  int `json:"client"`
	Backend int `json:"backend"`
}

// Sample is the state of the clocks at one moment.
type Sample struct {
	At      time.Time
	Machine Machine
	procs   map[int]Process
}

// Usage is what was used between two samples, in seconds.
type Usage struct {
	Wall          float64 `json:"wall_s"`
	Machine       float64 `json:"machine_s"` // all processors: busy, without idle and stolen time
	Foreign       float64 `json:"foreign_s"` // of it: processes outside the bench (kernel threads are not foreign)
	Steal         float64 `json:"steal_s"`   // taken by the hypervisor, not in Machine
	GatewayUser   float64 `json:"gateway_user_s"`
	GatewaySystem float64 `json:"gateway_system_s"`
	Client        float64 `json:"client_s"`
	Backend       float64 `json:"backend_s"`
	CPUs          int     `json:"cpus"`
}

// Gateway returns the CPU time of the gateway's process tree in seconds.
func (u Usage) Gateway() float64 { return u.GatewayUser + u.GatewaySystem }

// Bench returns the machine's CPU time without foreign processes in seconds.
func (u Usage) Bench() float64 { return max(0, u.Machine-u.Foreign) }

// ForeignShare returns the part of the machine's capacity that foreign processes and the hypervisor took, 0 to 1.
func (u Usage) ForeignShare() float64 {
	if u.Wall <= 0 || u.CPUs == 0 {
		return 0
	}
	return (u.Foreign + u.Steal) / (u.Wall * float64(u.CPUs))
}

// Begin takes the sample that opens a window: the machine's clock is read last, so that taking the sample is not
// part of the window. root is where the proc file system is mounted.
func Begin(root string) (Sample, error) {
	procs, err := ReadProcesses(root)
	if err != nil {
		return Sample{}, err
	}
	s, err := machine(root)
	s.procs = procs
	return s, err
}

// End takes the sample that closes a window: the machine's clock is read first.
func End(root string) (Sample, error) {
	s, err := machine(root)
	if err != nil {
		return Sample{}, err
	}
	s.procs, err = ReadProcesses(root)
	return s, err
}

func machine(root string) (Sample, error) {
	b, err := os.ReadFile(filepath.Join(root, "stat"))
	if err != nil {
		return Sample{}, fmt.Errorf("reading the machine's CPU time: %w", err)
	}
	at := time.Now()
	m, err := ParseMachine(b)
	return Sample{At: at, Machine: m}, err
}

// Between returns what was used from a to b.
func Between(a, b Sample, g Groups) Usage {
	u := Usage{
		Wall:  b.At.Sub(a.At).Seconds(),
		Steal: (b.Machine.Steal - a.Machine.Steal).Seconds(),
		CPUs:  b.Machine.CPUs,
	}
	idle := (b.Machine.Idle - a.Machine.Idle).Seconds()
	u.Machine = max(0, u.Wall*float64(u.CPUs)-idle-u.Steal)

	var foreign time.Duration
	before, after := owners(a.procs, g), owners(b.procs, g)
	for pid, p := range b.procs {
		own := after[pid]
		old, known := a.procs[pid]
		if known && (old.Start != p.Start || before[pid] != own) {
			known = false
		}
		if !known {
			// A process born in the window had used nothing when it opened.
			old = Process{}
		}
		user, system := (p.User - old.User).Seconds(), (p.System - old.System).Seconds()
		switch own {
		case gateway:
			u.GatewayUser += user
			u.GatewaySystem += system
		case client:
			u.Client += user + system
		case backend:
			u.Backend += user + system
		case outside:
			foreign += p.User + p.System + p.Reaped
		}
	}
	// Foreign time is a difference of sums, not a sum of differences: a process that ends in the window (a compiler)
	// leaves its time with the parent that waited for it.
	for pid, p := range a.procs {
		if before[pid] == outside {
			foreign -= p.User + p.System + p.Reaped
		}
	}
	u.Foreign = max(0, foreign.Seconds())
	return u
}

type owner uint8

const (
	outside owner = iota
	harness
	gateway
	client
	backend
	kernel
)

// owners assigns every process to the nearest of its ancestors that g names.
func owners(procs map[int]Process, g Groups) map[int]owner {
	roots := map[int]owner{kthreadd: kernel}
	for _, r := range []struct {
		pid int
		own owner
	}{{g.Bench, harness}, {g.Gateway, gateway}, {g.Client, client}, {g.Backend, backend}} {
		if r.pid != 0 {
			roots[r.pid] = r.own
		}
	}
	out := make(map[int]owner, len(procs))
	var find func(pid, depth int) owner
	find = func(pid, depth int) owner {
		if own, ok := out[pid]; ok {
			return own
		}
		own, ok := roots[pid]
		if p, exists := procs[pid]; !ok && exists && depth < 64 {
			own = find(p.Parent, depth+1)
		}
		if _, exists := procs[pid]; exists {
			out[pid] = own
		}
		return own
	}
	for pid := range procs {
		find(pid, 0)
	}
	return out
}
