package cpu

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// Memory is the machine's memory at one moment, in KiB.
type Memory struct {
	Used    uint64 // total minus free, buffers and page cache: all processes and the kernel
	Slab    uint64 // kernel objects: sockets, inodes, dentries
	RSS     uint64 // proportional set size of the gateway's process tree
	Foreign uint64 // proportional set size of processes outside the bench
}

// ParseMeminfo reads the text of /proc/meminfo (proc(5)) into Used and Slab.
func ParseMeminfo(b []byte) (Memory, error) {
	want := map[string]uint64{"MemTotal": 0, "MemFree": 0, "Buffers": 0, "Cached": 0, "Slab": 0}
	found := 0
	for line := range strings.Lines(string(b)) {
		name, rest, _ := strings.Cut(line, ":")
		if _, ok := want[name]; !ok {
			continue
		}
		n, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 62)
		if err != nil {
			return Memory{}, fmt.Errorf("/proc/meminfo: %q: %w", strings.TrimSpace(line), ErrFormat)
		}
		want[name] = n
		found++
	}
	if found != len(want) {
		return Memory{}, fmt.Errorf("/proc/meminfo: %d of %d expected lines: %w", found, len(want), ErrFormat)
	}
	return Memory{
		Used: want["MemTotal"] - want["MemFree"] - want["Buffers"] - want["Cached"],
		Slab: want["Slab"],
	}, nil
}

// ParsePss reads the text of /proc/PID/smaps_rollup and returns the proportional set size in KiB.
func ParsePss(b []byte) (uint64, error) {
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "Pss:"); ok {
			n, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 62)
			if err != nil {
				return 0, fmt.Errorf("smaps_rollup: %q: %w", strings.TrimSpace(line), ErrFormat)
			}
			return n, nil
		}
	}
	return 0, fmt.Errorf("smaps_rollup: no Pss line: %w", ErrFormat)
}

// ReadMemory measures the machine and the process trees of g.
func ReadMemory(root string, g Groups) (Memory, error) {
	procs, err := ReadProcesses(root)
	if err != nil {
		return Memory{}, err
	}
	b, err := os.ReadFile(filepath.Join(root, "meminfo"))
	if err != nil {
		return Memory{}, fmt.Errorf("reading the machine's memory: %w", err)
	}
	m, err := ParseMeminfo(b)
	if err != nil {
		return Memory{}, err
	}
	own := owners(procs, g)
	for pid := range procs {
		b, err := os.ReadFile(filepath.Join(root, strconv.Itoa(pid), "smaps_rollup"))
		if err != nil || len(b) == 0 {
			continue // kernel threads have no memory map; an ended process has none any more
		}
		pss, err := ParsePss(b)
		if err != nil {
			return Memory{}, fmt.Errorf("process %d: %w", pid, err)
		}
		switch own[pid] {
		case gateway:
			m.RSS += pss
		case outside:
			m.Foreign += pss
		}
	}
	return m, nil
}
