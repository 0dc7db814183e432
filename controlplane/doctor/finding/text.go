package finding

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Style is how text looks.
type Style struct {
	// Color marks statuses with ANSI colours.
	Color bool
	// Width is where lines are wrapped, in columns. Default 100.
	Width int
}

const defaultWidth = 100

// Printer writes findings under each other.
type Printer struct {
	style Style
	names int // width of the names
	out   strings.Builder
}

// NewPrinter returns a printer whose texts begin in one column behind the longest of names.
func NewPrinter(s Style, names []string) *Printer {
	if s.Width <= 0 {
		s.Width = defaultWidth
	}
	p := &Printer{style: s}
	for _, n := range names {
		p.names = max(p.names, utf8.RuneCountInString(Clean(n)))
	}
	return p
}

// Line writes one line, wrapped. An empty text is an empty line.
func (p *Printer) Line(text string) { p.block("", "", text) }

// Status writes text, with what precedes the colon at its beginning marked by s.
func (p *Printer) Status(s Status, text string) {
	mark, rest, ok := strings.Cut(text, ":")
	if !ok || !p.style.Color {
		p.Line(text)
		return
	}
	p.block(p.paint(s, Clean(mark)+":")+" ", "", rest)
}

// Finding writes one finding.
func (p *Printer) Finding(name string, f Finding) {
	const status = 4
	mark := string(f.Status)
	if f.Status == Fail {
		mark = "FAIL" // to be found without colours too
	}
	name = Clean(name)
	head := p.paint(f.Status, pad(mark, status)) + "  " + pad(name, p.names) + "  "
	indent := strings.Repeat(" ", 1+status+2+p.names+2)
	p.block(" "+head, indent, f.Text)
	width := 0
	keys := slices.Sorted(maps.Keys(f.Details))
	for _, k := range keys {
		width = max(width, utf8.RuneCountInString(Clean(k)))
	}
	for _, k := range keys {
		lead := indent + "  " + pad(Clean(k), width) + "  "
		p.block(lead, strings.Repeat(" ", len(indent)+width+4), f.Details[k])
	}
	p.table(indent+"  ", f.Table)
	for _, h := range f.Hints {
		p.block(indent+"-> ", indent+"   ", h)
	}
}

// table is not wrapped: a row that is cut is worse than a long one.
func (p *Printer) table(indent string, t *Table) {
	if t == nil || len(t.Rows) == 0 {
		return
	}
	widths := make([]int, len(t.Columns))
	rows := append([][]string{t.Columns}, t.Rows...)
	for _, r := range rows {
		for i := range min(len(r), len(widths)) {
			widths[i] = max(widths[i], utf8.RuneCountInString(Clean(r[i])))
		}
	}
	for _, r := range rows {
		line := indent
		for i := range min(len(r), len(widths)) {
			line += pad(Clean(r[i]), widths[i]) + "  "
		}
		p.out.WriteString(strings.TrimRight(line, " ") + "\n")
	}
}

// block writes text behind first, and what does not fit below it behind indent.
func (p *Printer) block(first, indent, text string) {
	line, used := first, visible(first)
	empty := true
	for word := range strings.FieldsSeq(Clean(text)) {
		n := utf8.RuneCountInString(word)
		if !empty && used+1+n > p.style.Width {
			p.out.WriteString(strings.TrimRight(line, " ") + "\n")
			line, used, empty = indent, visible(indent), true
		}
		if !empty {
			line += " "
			used++
		}
		line += word
		used += n
		empty = false
	}
	p.out.WriteString(strings.TrimRight(line, " ") + "\n")
}

// WriteTo writes everything to w.
func (p *Printer) WriteTo(w io.Writer) (int64, error) {
	n, err := io.WriteString(w, p.out.String())
	return int64(n), err
}

var colors = map[Status]string{OK: "\x1b[32m", Warn: "\x1b[33m", Fail: "\x1b[1;31m", Skip: "\x1b[2m"}

const reset = "\x1b[0m"

func (p *Printer) paint(s Status, text string) string {
	if !p.style.Color || colors[s] == "" {
		return text
	}
	return colors[s] + text + reset
}

// visible is the width of s without the colours of paint.
func visible(s string) int {
	for _, c := range colors {
		s = strings.ReplaceAll(s, c, "")
	}
	return utf8.RuneCountInString(strings.ReplaceAll(s, reset, ""))
}

func pad(s string, width int) string {
	return s + strings.Repeat(" ", max(0, width-utf8.RuneCountInString(s)))
}

// Clean makes text fit for a terminal: what is not printable, such as escape
// sequences and characters that change the direction of writing, is spelled out.
// Names, DNS records and certificates are written by strangers.
func Clean(text string) string {
	clean := true
	for _, r := range text {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			clean = false
			break
		}
	}
	if clean {
		return text
	}
	var b strings.Builder
	for i, r := range text {
		switch {
		case r == '\n' || r == '\t':
			b.WriteByte(' ')
		case r == utf8.RuneError:
			fmt.Fprintf(&b, `\x%02x`, text[i])
		case !unicode.IsPrint(r):
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}
