// Command gendoc writes the configuration reference. Run it from the top of the repository: go run ./controlplane/config/gendoc
package main

import (
	"bytes"
	"flag"
	"fmt"
	"os"

	"github.com/dstack-gw/dstack-gw/controlplane/config"
)

func main() {
	out := flag.String("o", "docs/reference/config.md", "file to write")
	flag.Parse()
	var page bytes.Buffer
	err := config.GenerateReference(&page)
	if err == nil {
		err = os.WriteFile(*out, page.Bytes(), 0o644)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "gendoc: %v\n", err)
		os.Exit(1)
	}
}
