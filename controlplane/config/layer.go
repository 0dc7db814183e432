package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/BurntSushi/toml"
)

const (
	maxFileSize = 1 << 20 // a configuration is a few KiB; more is a wrong file
	maxDepth    = 64      // tables and arrays inside each other
)

// node is one key of a layer or of the merged configuration: a table, a value, or neither for a JSON null.
// Values are string, bool, int64, uint64, float64, []any, map[string]any (inside arrays) and the TOML times.
type node struct {
	table map[string]*node
	value any
	file  string
	line  func() int // 1-based, 0 = unknown; computed on demand because it costs a pass over the file
}

// keys lists the keys of a table in the order of the file.
func (n *node) keys() []string {
	at := make(map[string]int, len(n.table))
	for k, child := range n.table {
		at[k] = child.line()
	}
	return slices.SortedFunc(maps.Keys(n.table), func(a, b string) int {
		if d := at[a] - at[b]; d != 0 {
			return d
		}
		return strings.Compare(a, b)
	})
}

// find walks down a dotted path; nil when there is nothing.
func (n *node) find(path string) *node {
	for part := range strings.SplitSeq(path, ".") {
		if n = n.table[part]; n == nil {
			return nil
		}
	}
	return n
}

// put stores a node under a dotted path, making the tables above it. A value in the way is replaced.
func (n *node) put(path string, leaf *node) {
	parent, name := n, path
	for {
		head, rest, more := strings.Cut(name, ".")
		if !more {
			parent.table[head] = leaf
			return
		}
		child := parent.table[head]
		if child == nil || child.table == nil {
			child = &node{table: map[string]*node{}, file: leaf.file, line: leaf.line}
			parent.table[head] = child
		}
		parent, name = child, rest
	}
}

// merge lays src over n: tables key by key, everything else replaced. It takes over the nodes of src.
func (n *node) merge(src *node) {
	for k, from := range src.table {
		to := n.table[k]
		if to == nil || to.table == nil || from.table == nil {
			n.table[k] = from
			continue
		}
		to.merge(from)
	}
}

// newTable is an empty table that no file wrote.
func newTable() *node {
	return &node{table: map[string]*node{}, line: func() int { return 0 }}
}

// parseFile reads one layer. Only the suffix .toml means TOML; everything else is JSON, as upstream has it.
func parseFile(name string, data []byte) (*node, error) {
	if len(data) > maxFileSize {
		return nil, &Problem{File: name, Err: fmt.Errorf("the file has %d bytes; a configuration has at most %d", len(data), maxFileSize)}
	}
	if filepath.Ext(name) == ".toml" {
		return parseTOML(name, data)
	}
	root, err := parseJSON(name, data)
	if p := (*Problem)(nil); errors.As(err, &p) && filepath.Ext(name) != ".json" {
		p.Err = fmt.Errorf("%w (only a file named *.toml is read as TOML, every other one as JSON)", p.Err)
	}
	return root, err
}

func parseTOML(name string, data []byte) (*node, error) {
	var top map[string]toml.Primitive
	md, err := toml.NewDecoder(bytes.NewReader(data)).Decode(&top)
	if err != nil {
		p := &Problem{File: name, Err: err}
		if pe := (toml.ParseError{}); errors.As(err, &pe) {
			// The message alone: the library's long form quotes lines of the file, and one of them may be a secret.
			p.Line, p.Err = pe.Position.Line, fmt.Errorf("not valid TOML: %s", pe.Message)
		}
		return nil, p
	}
	root := newTable()
	root.file = name
	if err := fillTOML(root, &md, top, 0); err != nil {
		return nil, &Problem{File: name, Err: err}
	}
	return root, nil
}

func fillTOML(parent *node, md *toml.MetaData, table map[string]toml.Primitive, depth int) error {
	if depth > maxDepth {
		return errTooDeep
	}
	for k, prim := range table {
		n := &node{file: parent.file, line: tomlLine(md, prim)}
		parent.table[k] = n
		var grab tomlValue
		if err := md.PrimitiveDecode(prim, &grab); err != nil {
			return err
		}
		if _, isTable := grab.data.(map[string]any); !isTable {
			n.value = grab.data
			continue
		}
		var inner map[string]toml.Primitive
		if err := md.PrimitiveDecode(prim, &inner); err != nil {
			return err
		}
		n.table = make(map[string]*node, len(inner))
		if err := fillTOML(n, md, inner, depth+1); err != nil {
			return err
		}
	}
	return nil
}

var errTooDeep = fmt.Errorf("tables or arrays are nested more than %d deep", maxDepth)

// tomlValue receives whatever the file has.
type tomlValue struct{ data any }

func (v *tomlValue) UnmarshalTOML(data any) error {
	v.data = data
	return nil
}

// tomlProbe refuses every value. The library reports refusals with a position, its only way to give the line of a key.
type tomlProbe struct{}

func (*tomlProbe) UnmarshalTOML(any) error { return errors.New("probe") }

func tomlLine(md *toml.MetaData, prim toml.Primitive) func() int {
	line := -1
	return func() int {
		if line < 0 {
			line = 0
			if pe := (toml.ParseError{}); errors.As(md.PrimitiveDecode(prim, new(tomlProbe)), &pe) {
				line = pe.Position.Line
			}
		}
		return line
	}
}

func parseJSON(name string, data []byte) (*node, error) {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	lineAt := func(offset int64) int { return 1 + bytes.Count(data[:min(offset, int64(len(data)))], []byte("\n")) }
	fail := func(err error) error {
		offset := dec.InputOffset()
		if se := (*json.SyntaxError)(nil); errors.As(err, &se) {
			offset = se.Offset
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			err, offset = errors.New("the file ends too early"), int64(len(data))
		}
		return &Problem{File: name, Line: lineAt(offset), Err: fmt.Errorf("not valid JSON: %w", err)}
	}

	var value func(depth int) (*node, error)
	value = func(depth int) (*node, error) {
		if depth > maxDepth {
			return nil, errTooDeep
		}
		tok, err := dec.Token()
		if err != nil {
			return nil, err
		}
		offset := dec.InputOffset()
		n := &node{file: name, line: func() int { return lineAt(offset) }}
		switch tok {
		case json.Delim('{'):
			n.table = map[string]*node{}
			for dec.More() {
				key, err := dec.Token()
				if err != nil {
					return nil, err
				}
				// The decoder has checked that keys are strings.
				if n.table[key.(string)], err = value(depth + 1); err != nil {
					return nil, err
				}
			}
			_, err = dec.Token()
		case json.Delim('['):
			list := []any{}
			for dec.More() {
				item, err := value(depth + 1)
				if err != nil {
					return nil, err
				}
				list = append(list, item.plain())
			}
			n.value = list
			_, err = dec.Token()
		default:
			n.value = jsonScalar(tok)
		}
		return n, err
	}

	root, err := value(0)
	if err != nil {
		return nil, fail(err)
	}
	if root.table == nil {
		return nil, fail(errors.New("the file is not an object"))
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, fail(errors.New("there is something after the object"))
	}
	return root, nil
}

// jsonScalar gives numbers the type that TOML would give them; what no integer type holds is a float.
func jsonScalar(tok json.Token) any {
	number, ok := tok.(json.Number)
	if !ok {
		return tok
	}
	if i, err := strconv.ParseInt(number.String(), 10, 64); err == nil {
		return i
	}
	if u, err := strconv.ParseUint(number.String(), 10, 64); err == nil {
		return u
	}
	f, _ := number.Float64()
	return f
}

// plain is the value of a node that stands in an array.
func (n *node) plain() any {
	if n.table == nil {
		return n.value
	}
	m := make(map[string]any, len(n.table))
	for k, child := range n.table {
		m[k] = child.plain()
	}
	return m
}
