package config

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"sort"
	"strconv"
	"strings"
)

// set puts a value of a file, or a default, into the Config. It reports false for a value that means "unset".
func (k *key) set(n *node) (bool, error) {
	if n.table == nil && n.value == nil {
		return false, nil // null of JSON
	}
	if limits, ok := k.to.(*map[string]Size); ok {
		return true, setLimits(limits, n)
	}
	if n.table != nil {
		return false, fmt.Errorf("is a table, want %s", k.typeName())
	}
	if k.optional && n.value == "" {
		return false, nil
	}
	switch to := k.to.(type) {
	case **uint16:
		*to = new(uint16)
	case **uint64:
		*to = new(uint64)
	case **Duration:
		*to = new(Duration)
	}
	if err := k.assign(n.value); err != nil {
		return false, err
	}
	return true, k.check()
}

func (k *key) assign(v any) error {
	switch to := k.to.(type) {
	case *bool:
		b, ok := v.(bool)
		if !ok {
			return k.wrongType(v)
		}
		*to = b
	case *string:
		if v == false && k.orFalse {
			v = ""
		}
		if i, ok := v.(int64); ok && k.orInteger {
			v = strconv.FormatInt(i, 10)
		}
		return assignString(k, to, v)
	case *int:
		return assignInteger(k, to, v, math.MaxInt32)
	case *uint16:
		return assignInteger(k, to, v, math.MaxUint16)
	case **uint16:
		return assignInteger(k, *to, v, math.MaxUint16)
	case *uint32:
		return assignInteger(k, to, v, math.MaxUint32)
	case *uint64:
		return assignInteger(k, to, v, math.MaxUint64)
	case **uint64:
		return assignInteger(k, *to, v, math.MaxUint64)
	case *Size:
		if _, ok := v.(string); ok {
			return assignParsed(k, to, v, ParseSize)
		}
		return assignInteger(k, to, v, math.MaxUint64)
	case *Duration:
		return assignParsed(k, to, v, ParseDuration)
	case **Duration:
		return assignParsed(k, *to, v, ParseDuration)
	case *Address:
		return assignParsed(k, to, v, ParseAddress)
	case *PortSpec:
		if _, ok := v.(string); ok {
			return assignParsed(k, to, v, ParsePortSpec)
		}
		if err := assignInteger(k, &to.First, v, math.MaxUint16); err != nil {
			return err
		}
		to.Last = to.First
	case *netip.Addr:
		return assignParsed(k, to, v, k.parseAddr)
	case *netip.Prefix:
		return assignParsed(k, to, v, k.parsePrefix)
	case *[]string:
		return assignList(k, to, v, func(s string) (string, error) { return s, nil })
	case *[]netip.Prefix:
		return assignList(k, to, v, k.parsePrefix)
	case *[]netip.AddrPort:
		return assignList(k, to, v, func(s string) (netip.AddrPort, error) {
			ap, err := netip.ParseAddrPort(s)
			if err != nil {
				err = fmt.Errorf("%q is not an ip:port", s)
			}
			return ap, err
		})
	default:
		panic(fmt.Sprintf("config: key %s has the type %T, which set does not know", k.name, k.to))
	}
	return nil
}

func assignString(k *key, to *string, v any) error {
	s, ok := v.(string)
	if !ok {
		return k.wrongType(v)
	}
	*to = s
	return nil
}

func assignInteger[T ~int | ~uint16 | ~uint32 | ~uint64](k *key, to *T, v any, most uint64) error {
	var u uint64
	switch n := v.(type) {
	case int64:
		if n < 0 {
			return fmt.Errorf("is %d, must not be negative", n)
		}
		u = uint64(n)
	case uint64:
		u = min(n, math.MaxInt64) // only JSON can say more; Print writes TOML, and no count here comes near
	default:
		return k.wrongType(v)
	}
	if u > most {
		return fmt.Errorf("is %d, at most %d is possible", u, most)
	}
	*to = T(u)
	return nil
}

func assignParsed[T any](k *key, to *T, v any, parse func(string) (T, error)) error {
	s, ok := v.(string)
	if !ok {
		return k.wrongType(v)
	}
	parsed, err := parse(s)
	if err == nil {
		*to = parsed
	}
	return err
}

func assignList[T any](k *key, to *[]T, v any, parse func(string) (T, error)) error {
	items, ok := v.([]any)
	if !ok {
		return k.wrongType(v)
	}
	list := make([]T, len(items))
	for i, item := range items {
		if err := assignParsed(k, &list[i], item, parse); err != nil {
			return fmt.Errorf("entry %d: %w", i+1, err)
		}
	}
	*to = list
	return nil
}

// setLimits starts from nothing: the tables of all layers are already merged.
func setLimits(to *map[string]Size, n *node) error {
	if n.table == nil {
		return errors.New("want a table of sizes by method name")
	}
	*to = make(map[string]Size, len(n.table))
	for _, name := range n.keys() {
		var size Size
		one := key{name: name, to: &size}
		if set, err := one.set(n.table[name]); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		} else if set {
			(*to)[name] = size
		}
	}
	return nil
}

func (k *key) parseAddr(s string) (netip.Addr, error) {
	ip, err := netip.ParseAddr(s)
	switch {
	case err != nil:
		return ip, fmt.Errorf("%q is not an IP address", s)
	case k.family == 4 && !ip.Is4():
		return ip, fmt.Errorf("%q is not an IPv4 address (IPv6 has its own key, listen_addr6)", s)
	case k.family == 6 && !ip.Is6():
		return ip, fmt.Errorf("%q is not an IPv6 address", s)
	}
	return ip, nil
}

func (k *key) parsePrefix(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil:
		return p, fmt.Errorf("%q is not a network in CIDR notation (a single address is a.b.c.d/32)", s)
	case k.family == 4 && !p.Addr().Is4():
		return p, fmt.Errorf("%q is not an IPv4 network", s)
	case !k.hostBits:
		p = p.Masked()
	}
	return p, nil
}

// check applies the limits of the table to what is set.
func (k *key) check() error {
	if len(k.oneOf) > 0 {
		list := []string{}
		switch to := k.to.(type) {
		case *string:
			list = append(list, *to)
		case *[]string:
			list = *to
		}
		for _, s := range list {
			if !slices.Contains(k.oneOf, s) {
				return fmt.Errorf("is %q, want one of %s", s, quoted(k.oneOf, ", "))
			}
		}
	}
	var n uint64
	unit := fmt.Sprint
	switch to := k.to.(type) {
	case *int:
		n = uint64(*to)
	case *uint32:
		n = uint64(*to)
	case *uint64:
		n = *to
	case *Size:
		n, unit = uint64(*to), func(v ...any) string { return Size(v[0].(uint64)).String() }
	case *Duration:
		n, unit = uint64(*to), func(v ...any) string { return Duration(v[0].(uint64)).String() }
	case *[]string:
		n, unit = uint64(len(*to)), func(v ...any) string { return fmt.Sprint(v[0], " entries") }
	default:
		return nil
	}
	switch {
	case n < k.min:
		return fmt.Errorf("is %s, at least %s is needed", unit(n), unit(k.min))
	case k.max > 0 && n > k.max:
		return fmt.Errorf("is %s, at most %s is possible", unit(n), unit(k.max))
	}
	return nil
}

// wrongType says what is wanted, with an example where the notation is not obvious, and what is there unless it is secret.
func (k *key) wrongType(v any) error {
	hint := ""
	switch k.to.(type) {
	case *Duration, **Duration:
		hint = `, as in "30s"`
	case *[]string, *[]netip.Prefix, *[]netip.AddrPort:
		hint = ", as in [\"...\"]"
	}
	if k.secret {
		return fmt.Errorf("has the wrong type, want %s%s", k.typeName(), hint)
	}
	return fmt.Errorf("is %s, want %s%s", literal(v), k.typeName(), hint)
}

// typeName is the type for the reference page and for messages.
func (k *key) typeName() string {
	if len(k.oneOf) > 0 {
		name := quoted(k.oneOf, " or ")
		if _, list := k.to.(*[]string); list {
			name = "list of " + name
		}
		return name
	}
	version := ""
	if k.family != 0 {
		version = "IPv" + strconv.Itoa(k.family) + " "
	}
	switch k.to.(type) {
	case *bool:
		return "bool"
	case *string:
		switch {
		case k.orFalse:
			return "string or false"
		case k.url:
			return "URL"
		case k.besides:
			return "path"
		}
		return "string"
	case *int, *uint32, *uint64, **uint64:
		return "integer"
	case *uint16, **uint16:
		return "port"
	case *Size:
		return "size"
	case *Duration, **Duration:
		return "duration"
	case *Address:
		return "address"
	case *PortSpec:
		return "port or range"
	case *netip.Addr:
		return version + "address"
	case *netip.Prefix:
		return version + "CIDR"
	case *[]string:
		return "list of strings"
	case *[]netip.Prefix:
		return "list of " + version + "CIDR"
	case *[]netip.AddrPort:
		return "list of ip:port"
	case *map[string]Size:
		return "table of sizes"
	}
	panic(fmt.Sprintf("config: key %s has the type %T, which typeName does not know", k.name, k.to))
}

// value is what is set, in the types that literal renders; nil when nothing is.
func (k *key) value() any {
	switch to := k.to.(type) {
	case *bool:
		return *to
	case *string:
		if k.orFalse && *to == "" {
			return false
		}
		return *to
	case *int:
		return *to
	case *uint16:
		return *to
	case *uint32:
		return *to
	case *uint64:
		return *to
	case **uint16:
		if *to != nil {
			return **to
		}
	case **uint64:
		if *to != nil {
			return **to
		}
	case **Duration:
		if *to != nil {
			return (*to).String()
		}
	case *Duration:
		return to.String()
	case *Size:
		return to.String()
	case *Address:
		return to.String()
	case *PortSpec:
		if to.First == to.Last {
			return to.First
		}
		return to.String()
	case *netip.Addr:
		if !to.IsValid() {
			return ""
		}
		return to.String()
	case *netip.Prefix:
		return to.String()
	case *[]string:
		return texts(*to, func(s string) string { return s })
	case *[]netip.Prefix:
		return texts(*to, netip.Prefix.String)
	case *[]netip.AddrPort:
		return texts(*to, netip.AddrPort.String)
	case *map[string]Size:
		m := make(map[string]any, len(*to))
		for name, size := range *to {
			m[name] = size.String()
		}
		if len(m) > 0 {
			return m
		}
	}
	return nil
}

func texts[T any](list []T, text func(T) string) []any {
	out := make([]any, len(list))
	for i, item := range list {
		out[i] = text(item)
	}
	return out
}

// literal renders a value as TOML.
func literal(v any) string {
	switch v := v.(type) {
	case string:
		return tomlString(v)
	case []any:
		parts := make([]string, len(v))
		for i, item := range v {
			parts[i] = literal(item)
		}
		return "[" + strings.Join(parts, ", ") + "]"
	case map[string]any:
		parts := make([]string, 0, len(v))
		for name, item := range v {
			parts = append(parts, tomlString(name)+" = "+literal(item))
		}
		sort.Strings(parts)
		return "{ " + strings.Join(parts, ", ") + " }"
	}
	return fmt.Sprint(v)
}

// tomlString is a TOML basic string. Go's own quoting has escapes that TOML does not know.
func tomlString(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range strings.ToValidUTF8(s, "\uFFFD") {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r < 0x20 || r == 0x7f:
			fmt.Fprintf(&b, `\u%04X`, r)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
	return b.String()
}

func quoted(list []string, separator string) string {
	parts := make([]string, len(list))
	for i, s := range list {
		parts[i] = strconv.Quote(s)
	}
	return strings.Join(parts, separator)
}
