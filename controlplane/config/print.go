package config

import (
	"fmt"
	"io"
	"net/url"
	"strconv"
	"strings"
)

// Print writes the effective configuration as TOML that Load reads back. Behind each value that is not a default stands the file
// and line it came from. Secrets and passwords in URLs are replaced.
func Print(w io.Writer, c *Config) error {
	var b strings.Builder
	b.WriteString("# Effective configuration. Values without a place are defaults.\n")
	// The table binds to a Config by pointer; binding to a copy leaves the caller's alone.
	shown := *c
	for _, s := range table(&shown) {
		if s.present != nil && !*s.present {
			continue
		}
		if s.path != "" {
			fmt.Fprintf(&b, "\n[%s]", s.path)
			if o, ok := c.origin[s.path]; ok && s.present != nil {
				b.WriteString(" # " + tomlComment(o.String()))
			}
			b.WriteByte('\n')
		}
		for _, k := range s.keys {
			v := k.shown()
			if v == nil {
				continue
			}
			fmt.Fprintf(&b, "%s = %s", k.name, literal(v))
			if o, ok := c.origin[join(s.path, k.name)]; ok {
				b.WriteString(" # " + tomlComment(o.String()))
			}
			b.WriteByte('\n')
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (o origin) String() string {
	if o.line == 0 {
		return o.file
	}
	return o.file + ":" + strconv.Itoa(o.line)
}

// tomlComment keeps odd file names inside their comment.
func tomlComment(s string) string {
	return strings.Map(func(r rune) rune {
		if r < 0x20 || r == 0x7f {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}

// shown is the value without what nobody should see.
func (k *key) shown() any {
	v := k.value()
	switch {
	case k.secret && v != "":
		return redacted
	case !k.url:
		return v
	}
	switch v := v.(type) {
	case string:
		return withoutUserinfo(v)
	case []any:
		for i := range v {
			v[i] = withoutUserinfo(v[i].(string))
		}
	}
	return v
}

func withoutUserinfo(text string) string {
	u, err := url.Parse(text)
	switch {
	case err == nil && u.User == nil:
		return text
	case err == nil:
		u.User = url.User("redacted") // the name alone is the token of some services
		return u.String()
	case strings.Contains(text, "@"):
		return redacted
	}
	return text
}
