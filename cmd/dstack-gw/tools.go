package main

import (
	"fmt"
	"io"
)

func doctorTool(path string, asJSON bool, stdout, stderr io.Writer) int {
	fmt.Fprintln(stderr, "dstack-gw: doctor is being built")
	return 1
}

func explainTool(path, name string, asJSON bool, stdout, stderr io.Writer) int {
	fmt.Fprintln(stderr, "dstack-gw: explain is being built")
	return 1
}
