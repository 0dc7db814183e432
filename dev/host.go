package dev

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"strings"

	"golang.org/x/sys/unix"
)

// program is something of the distribution that is needed.
type program struct {
	name    string // of the executable
	pkg     string // of Debian and Ubuntu
	service string // that the package starts and enables, "" for none
}

func programs() []program {
	return []program{
		{name: "curl", pkg: "curl"},
		{name: "nginx", pkg: "nginx-light", service: "nginx.service"},
	}
}

// adminPath is where root's programs are, whatever PATH says.
const adminPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// find is exec.LookPath on PATH and on adminPath.
func find(name string) (string, bool) {
	if p, err := exec.LookPath(name); err == nil {
		return p, true
	}
	for dir := range strings.SplitSeq(adminPath, ":") {
		p := dir + "/" + name
		if info, err := os.Stat(p); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return p, true
		}
	}
	return "", false
}

// installPrograms installs what is missing and says so.
func installPrograms(out io.Writer) error {
	var missing []program
	for _, p := range programs() {
		if _, ok := find(p.name); !ok {
			missing = append(missing, p)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	var names, pkgs, services []string
	for _, p := range missing {
		names, pkgs = append(names, p.name), append(pkgs, p.pkg)
		if p.service != "" {
			services = append(services, p.service)
		}
	}
	apt, ok := find("apt-get")
	if !ok {
		return fmt.Errorf("%s is missing and this system has no apt-get: install it with the system's package manager", strings.Join(names, ", "))
	}
	fmt.Fprintf(out, "Installing the packages %s (missing: %s).\n", strings.Join(pkgs, " "), strings.Join(names, ", "))
	if len(services) > 0 {
		allow, err := forbidServices()
		if err != nil {
			return err
		}
		defer allow()
	}
	run := func(argv ...string) error {
		cmd := exec.Command(argv[0], argv[1:]...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		cmd.Stdout, cmd.Stderr = out, out
		if err := cmd.Run(); err != nil {
			return fmt.Errorf("%s: %w", strings.Join(argv, " "), err)
		}
		return nil
	}
	if err := run(apt, "update", "-q"); err != nil {
		return err
	}
	if err := run(append([]string{apt, "install", "-q", "-y", "--no-install-recommends"}, pkgs...)...); err != nil {
		return err
	}
	// The package was not here a moment ago, so nobody relies on its service.
	if systemctl, ok := find("systemctl"); ok && systemdRuns() {
		for _, s := range services {
			fmt.Fprintf(out, "Disabling %s, which nobody asked for: the web servers of the CVMs are started by dstack dev.\n", s)
			if err := run(systemctl, "disable", "-q", s); err != nil {
				return err
			}
		}
	}
	for _, p := range missing {
		if _, ok := find(p.name); !ok {
			return fmt.Errorf("package %s is installed but there is no program %s", p.pkg, p.name)
		}
	}
	return nil
}

func systemdRuns() bool {
	_, err := os.Stat("/run/systemd/system")
	return err == nil
}

const policyFile = "/usr/sbin/policy-rc.d"

// forbidServices keeps packages from starting their services while they are
// installed (the policy-rc.d interface of Debian's invoke-rc.d). A policy that is
// there already is left alone.
func forbidServices() (allow func(), err error) {
	f, err := os.OpenFile(policyFile, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if errors.Is(err, os.ErrExist) {
		return func() {}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("keep packages from starting services: %w", err)
	}
	allow = func() { os.Remove(policyFile) }
	_, err = f.WriteString("#!/bin/sh\nexit 101\n")
	if err = errors.Join(err, f.Close()); err != nil {
		allow()
		return nil, fmt.Errorf("keep packages from starting services: %w", err)
	}
	return allow, nil
}

// wwwUser is whom nginx's workers run as.
func wwwUser() (string, error) {
	for _, name := range []string{"www-data", "nginx", "nobody"} {
		if _, err := user.Lookup(name); err == nil {
			return name, nil
		}
	}
	return "", errors.New("this system has none of the users www-data, nginx and nobody to run nginx as")
}

// checkKernel looks for what cannot be found out by using it.
func checkKernel() error {
	if _, err := os.Stat("/proc/self/ns/net"); err != nil {
		return errors.New("this kernel has no network namespaces (CONFIG_NET_NS)")
	}
	// CAP_NET_ADMIN in the namespace of this process and CAP_SYS_ADMIN are
	// missing for root in most containers.
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return fmt.Errorf("read the capabilities of this process: %w", err)
	}
	for _, c := range []struct {
		bit  int
		name string
	}{{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"}, {unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN"}} {
		if data[c.bit/32].Effective&(1<<(c.bit%32)) == 0 {
			return fmt.Errorf("%s is missing although this is root: in a container, run it with --privileged", c.name)
		}
	}
	return nil
}

// Sudo is the command that runs this program as root with the same arguments,
// nil if it is root already.
func Sudo(euid int, argv []string) ([]string, error) {
	if euid == 0 {
		return nil, nil
	}
	sudo, ok := find("sudo")
	if !ok {
		return nil, errors.New("root is needed for network namespaces and WireGuard, and there is no sudo: run this as root (su -c)")
	}
	return append([]string{sudo, "--"}, argv...), nil
}
