// Command gendashboard prints the Grafana dashboard of dstack-gw (package grafana).
package main

import (
	"fmt"
	"os"

	"github.com/dstack-gw/dstack-gw/deploy/grafana"
)

func main() {
	if err := grafana.Write(os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "gendashboard:", err)
		os.Exit(1)
	}
}
