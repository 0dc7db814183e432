package config

import (
	"cmp"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// DefaultEtcDir is where the system-wide file is looked for.
const DefaultEtcDir = "/etc/gateway"

// overlayEnv is the environment variable with a last layer (base64 of TOML), for deployments whose files are fixed by a measurement.
const overlayEnv = "DSTACK_GW_CONFIG"

// redacted stands for a secret in the output of Print. A file that carries it was made from such output.
const redacted = "<redacted>"

// LoadOptions say where configuration comes from. The zero value reads DefaultEtcDir and the working directory, without environment.
type LoadOptions struct {
	// Path is the file of -c; "" = none. A file that does not exist is an error. A relative one is looked for in Dir
	// and, as upstream does, in the directories above it.
	Path string
	// Env reads the environment; nil = an empty one.
	Env func(string) string
	// Dir is the working directory; "" = ".".
	Dir string
	// EtcDir holds the system-wide gateway.toml and gateway.json; "" = DefaultEtcDir.
	EtcDir string
}

// Default is the configuration without any file. It is not valid: the main server has no certificate.
func Default() *Config {
	c, _, _ := build(nil, func(string) string { return "" })
	return c
}

// Load reads all layers, later ones winning: defaults, EtcDir, working directory, Path, environment overlay (gateway spec 1.2).
// The error joins one *Problem for every reason not to start with this configuration. The warnings are complete in either case.
func Load(opts LoadOptions) (*Config, []Warning, error) {
	env := opts.Env
	if env == nil {
		env = func(string) string { return "" }
	}
	layers, warnings, err := readLayers(opts, env)
	if err != nil {
		return nil, warnings, err
	}
	c, more, err := build(layers, env)
	warnings = append(warnings, more...)
	if err != nil {
		return nil, warnings, err
	}
	return c, warnings, nil
}

func readLayers(opts LoadOptions, env func(string) string) (layers []*node, warnings []Warning, err error) {
	dir := cmp.Or(opts.Dir, ".")
	etc := cmp.Or(opts.EtcDir, DefaultEtcDir)
	files := []string{
		filepath.Join(etc, "gateway.toml"), filepath.Join(etc, "gateway.json"),
		filepath.Join(dir, "gateway.toml"), filepath.Join(dir, "gateway.json"),
	}
	var problems []error
	read := func(file string, wanted bool) {
		data, err := os.ReadFile(file)
		switch {
		case errors.Is(err, fs.ErrNotExist) && !wanted:
			return
		case err != nil:
			problems = append(problems, fmt.Errorf("read configuration: %w", err))
			return
		}
		layer, err := parseFile(file, data)
		if err != nil {
			problems = append(problems, err)
			return
		}
		layers = append(layers, layer)
	}

	if opts.Path != "" {
		path, moved := findUpwards(dir, opts.Path)
		if moved {
			warnings = append(warnings, Warning{Kind: Suspicious, File: path,
				Text: fmt.Sprintf("used for -c %s, which does not exist in the working directory", opts.Path)})
		}
		// The file of -c may be the one in the working directory; reading it twice would say everything twice.
		files = slices.DeleteFunc(files, func(f string) bool { return sameFile(f, path) })
		for _, f := range files {
			read(f, false)
		}
		read(path, true)
	} else {
		for _, f := range files {
			read(f, false)
		}
	}

	if text := env(overlayEnv); text != "" {
		layer, err := parseOverlay(text)
		if err != nil {
			problems = append(problems, err)
		} else {
			layers = append(layers, layer)
		}
	}
	return layers, warnings, errors.Join(problems...)
}

func parseOverlay(text string) (*node, error) {
	name := "$" + overlayEnv
	data, err := base64.StdEncoding.DecodeString(strings.TrimSpace(text))
	if err != nil {
		return nil, &Problem{File: name, Err: fmt.Errorf("not valid base64: %w", err)}
	}
	return parseTOML(name, data)
}

// findUpwards resolves the path of -c. moved says that it was found in a directory above.
func findUpwards(dir, path string) (found string, moved bool) {
	if filepath.IsAbs(path) {
		return path, false
	}
	first := filepath.Join(dir, path)
	at, err := filepath.Abs(dir)
	if err != nil || exists(first) {
		return first, false
	}
	for up := filepath.Dir(at); ; up = filepath.Dir(up) {
		if candidate := filepath.Join(up, path); exists(candidate) {
			return candidate, true
		}
		if up == filepath.Dir(up) {
			return first, false
		}
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func sameFile(a, b string) bool {
	x, err := os.Stat(a)
	if err != nil {
		return false
	}
	y, err := os.Stat(b)
	return err == nil && os.SameFile(x, y)
}

// build makes the Config of layers, which it uses up.
func build(layers []*node, env func(string) string) (*Config, []Warning, error) {
	c := &Config{origin: map[string]origin{}}
	sections := table(c)
	l := &loader{config: c, sections: sections, known: index(sections), retired: map[string]retired{}, broken: map[string]bool{}}
	for _, r := range retiredKeys() {
		l.retired[r.path] = r
	}

	merged := newTable()
	for _, layer := range layers {
		l.retire(layer)
		l.inspect("", layer, false)
		l.resolvePaths(layer)
		merged.merge(layer)
	}
	l.decode(merged)
	l.finish(env)
	l.sort(layers)
	var errs []error
	for _, p := range l.problems {
		errs = append(errs, p)
	}
	return c, l.warnings, errors.Join(errs...)
}

// sort brings what is said into the order of the files, with what has no place in a file behind.
func (l *loader) sort(layers []*node) {
	rank := map[string]int{}
	for i, layer := range layers {
		rank[layer.file] = i + 1
	}
	compare := func(fileA string, lineA int, fileB string, lineB int) int {
		a, b := cmp.Or(rank[fileA], len(layers)+1), cmp.Or(rank[fileB], len(layers)+1)
		return cmp.Or(a-b, lineA-lineB)
	}
	slices.SortStableFunc(l.warnings, func(a, b Warning) int { return compare(a.File, a.Line, b.File, b.Line) })
	slices.SortStableFunc(l.problems, func(a, b *Problem) int { return compare(a.File, a.Line, b.File, b.Line) })
}

// loader collects what there is to say while a Config is made.
type loader struct {
	config   *Config
	sections []section
	known    map[string]any // path -> *section or *key
	retired  map[string]retired
	broken   map[string]bool // keys whose value did not decode
	warnings []Warning
	problems []*Problem
}

// index finds sections and keys by path.
func index(sections []section) map[string]any {
	known := map[string]any{}
	for i := range sections {
		s := &sections[i]
		known[s.path] = s
		for j := range s.keys {
			known[join(s.path, s.keys[j].name)] = &s.keys[j]
		}
	}
	return known
}

func join(parent, name string) string {
	if parent == "" {
		return name
	}
	return parent + "." + name
}

// warn says something about a decoded key. One that did not decode has its default, about which there is nothing to say.
func (l *loader) warn(kind Kind, path, format string, args ...any) {
	if l.broken[path] {
		return
	}
	o := l.place(path)
	l.warnings = append(l.warnings, Warning{Kind: kind, Key: path, File: o.file, Line: o.line, Text: fmt.Sprintf(format, args...)})
}

// place is where a key was set, or else where its table begins.
func (l *loader) place(path string) origin {
	if o, ok := l.config.origin[path]; ok {
		return o
	}
	parent, _ := split(path)
	return l.config.origin[parent]
}

func (l *loader) warnAt(kind Kind, path string, n *node, text string) {
	l.warnings = append(l.warnings, Warning{Kind: kind, Key: path, File: n.file, Line: n.line(), Text: text})
}

// fail reports what is wrong with a decoded key; a key that did not even decode has been reported.
func (l *loader) fail(path string, err error) {
	if l.broken[path] {
		return
	}
	o := l.place(path)
	l.problems = append(l.problems, &Problem{Key: path, File: o.file, Line: o.line, Err: err})
}

func (l *loader) failAt(path string, n *node, err error) {
	l.problems = append(l.problems, &Problem{Key: path, File: n.file, Line: n.line(), Err: err})
}

// retire handles the old keys of one layer: it says what they mean now and gives their value to the key that took over, unless
// the same layer sets that one too. Per layer, so that the order of layers decides between an old and a new name.
func (l *loader) retire(layer *node) {
	var found []retired
	for path, r := range l.retired {
		if layer.find(path) != nil {
			found = append(found, r)
		}
	}
	slices.SortFunc(found, func(a, b retired) int {
		return cmp.Or(layer.find(a.path).line()-layer.find(b.path).line(), strings.Compare(a.path, b.path))
	})
	for _, r := range found {
		n := layer.find(r.path)
		text := r.now
		if r.kind == Legacy && r.when != "all" {
			text += " (key of upstream " + r.when + ")"
		}
		if r.to == "" {
			l.warnAt(r.kind, r.path, n, text)
			continue
		}
		if set := layer.find(r.to); set != nil && set.value != "" {
			l.warnAt(r.kind, r.path, n, "ignored because "+r.to+" is set as well")
			continue
		}
		moved := *n
		if r.convert != nil && n.table == nil {
			v, err := r.convert(n.value)
			if err != nil {
				l.failAt(r.path, n, err)
				continue
			}
			moved.value = v
		}
		l.warnAt(r.kind, r.path, n, text)
		layer.put(r.to, &moved)
	}
}

// invert turns a switch around whose successor means the opposite.
func invert(v any) (any, error) {
	b, ok := v.(bool)
	if !ok {
		return nil, fmt.Errorf("is %s, want bool", literal(v))
	}
	return !b, nil
}

// inspect looks for what the table does not know.
func (l *loader) inspect(path string, n *node, strict bool) {
	for _, name := range n.keys() {
		child := n.table[name]
		p := join(path, quoteDots(name))
		if _, old := l.retired[p]; old {
			continue
		}
		switch known := l.known[p].(type) {
		case *key:
			continue
		case *section:
			if child.table != nil {
				l.inspect(p, child, known.strict)
			} else if child.value != nil {
				l.failAt(p, child, errors.New("must be a table"))
			}
			continue
		}
		text := "unknown key"
		if child.table != nil {
			text = "unknown table"
		}
		if strict {
			text += ", refused in this part of the file"
		} else {
			text += ", ignored"
		}
		if meant := nearest(p, l.names()); meant != "" {
			text += "; did you mean " + meant + "?"
		}
		if strict {
			l.failAt(p, child, errors.New(text))
		} else {
			l.warnAt(Unknown, p, child, text)
		}
	}
}

// names are all paths that can be meant, in the order of the table.
func (l *loader) names() []string {
	var all []string
	for _, s := range l.sections {
		if s.path != "" {
			all = append(all, s.path)
		}
		for _, k := range s.keys {
			all = append(all, join(s.path, k.name))
		}
	}
	return all
}

// quoteDots keeps a quoted key that contains a dot apart from a path.
func quoteDots(name string) string {
	if strings.Contains(name, ".") || name == "" {
		return tomlString(name)
	}
	return name
}

// resolvePaths makes paths absolute that are meant relative to their file.
func (l *loader) resolvePaths(layer *node) {
	for path, known := range l.known {
		k, ok := known.(*key)
		if !ok || !k.besides {
			continue
		}
		n := layer.find(path)
		if n == nil || strings.HasPrefix(n.file, "$") {
			continue
		}
		if p, ok := n.value.(string); ok && p != "" && !filepath.IsAbs(p) {
			p = filepath.Join(filepath.Dir(n.file), p)
			if abs, err := filepath.Abs(p); err == nil {
				p = abs
			}
			n.value = p
		}
	}
}

// decode fills the Config from the defaults of the table and then from the merged layers.
func (l *loader) decode(merged *node) {
	for i := range l.sections {
		s := &l.sections[i]
		tree := merged
		if s.path != "" {
			tree = merged.find(s.path)
		}
		there := tree != nil && tree.table != nil
		if s.present != nil {
			*s.present = there
		}
		if there && s.path != "" {
			l.config.origin[s.path] = origin{tree.file, tree.line()}
		}
		for j := range s.keys {
			k := &s.keys[j]
			path := join(s.path, k.name)
			if _, err := k.set(&node{value: plainDefault(k.def)}); err != nil {
				panic(fmt.Sprintf("config: the default of %s does not load: %v", path, err))
			}
			if tree == nil || tree.table[k.name] == nil {
				continue
			}
			n := tree.table[k.name]
			if k.secret && n.value == redacted {
				l.broken[path] = true
				l.failAt(path, n, errors.New("the value was removed by `config print`; put the secret back"))
				continue
			}
			set, err := k.set(n)
			if err != nil {
				l.broken[path] = true
				l.failAt(path, n, err)
			} else if set {
				l.config.origin[path] = origin{n.file, n.line()}
			}
		}
	}
}

// plainDefault gives numbers of the table the type that files give them.
func plainDefault(v any) any {
	if i, ok := v.(int); ok {
		return int64(i)
	}
	return v
}
