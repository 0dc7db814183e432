package prpc

import (
	"errors"
	"fmt"
	"math"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// maxQueryDepth bounds the brackets of one name: a[b][c] has two.
const maxQueryDepth = 8

// UnmarshalQuery reads a raw query string (no leading ?) into a fresh message.
//
// Fields are form-encoded pairs: a=1, members of messages and maps a[b]=2,
// elements a[0]=x&a[1]=y (ordered by index, gaps allowed), a[]=x or just a
// repeated. Brackets may be percent-encoded. Unknown names are ignored; an
// empty value means absent for messages and optionals. Values follow the rules
// of Unmarshal, written without quotes.
func UnmarshalQuery(raw string, m proto.Message) error {
	r := m.ProtoReflect()
	if r.Descriptor().FullName() == emptyName {
		return nil
	}
	if err := checkMapping(r.Descriptor(), nil); err != nil {
		return err
	}
	var root queryNode
	for raw != "" {
		var pair string
		pair, raw, _ = strings.Cut(raw, "&")
		if pair == "" {
			continue
		}
		name, value, _ := strings.Cut(pair, "=")
		path := splitName(unescape(name))
		if r.Descriptor().Fields().ByName(protoreflect.Name(path[0])) == nil {
			continue
		}
		if len(path) > maxQueryDepth+1 {
			return fmt.Errorf("%s: more than %d brackets in a name", path[0], maxQueryDepth)
		}
		root.add(path, unescape(value))
	}
	return root.message(r)
}

// unescape undoes form encoding; what is not validly encoded stands for itself.
func unescape(s string) string {
	if u, err := url.QueryUnescape(s); err == nil {
		return u
	}
	return s
}

// splitName takes a[b][] apart into a, b and "". A name that does not have this
// form is one piece and so no field.
func splitName(name string) []string {
	head, rest, nested := strings.Cut(name, "[")
	if !nested {
		return []string{name}
	}
	if !strings.HasSuffix(rest, "]") {
		return []string{name}
	}
	return append([]string{head}, strings.Split(rest[:len(rest)-1], "][")...)
}

// queryNode is a name and all that was said about it.
type queryNode struct {
	values []string
	kids   map[string]*queryNode
	order  []queryKid // kids and unnamed ones, as they came
}

type queryKid struct {
	name string
	node *queryNode
}

func (n *queryNode) add(path []string, value string) {
	if len(path) == 0 {
		n.values = append(n.values, value)
		return
	}
	name := path[0]
	kid := n.kids[name]
	if kid == nil || name == "" { // every a[] is an element of its own
		kid = new(queryNode)
		n.order = append(n.order, queryKid{name, kid})
		if n.kids == nil {
			n.kids = make(map[string]*queryNode)
		}
		n.kids[name] = kid
	}
	kid.add(path[1:], value)
}

// absent tells whether the name was given without a value: a or a=.
func (n *queryNode) absent() bool {
	return len(n.order) == 0 && len(n.values) == 1 && n.values[0] == ""
}

func (n *queryNode) message(m protoreflect.Message) error {
	if len(n.values) > 0 {
		return errors.New("expected members in brackets")
	}
	fields := m.Descriptor().Fields()
	for _, kid := range n.order {
		fd := fields.ByName(protoreflect.Name(kid.name))
		if fd == nil {
			continue
		}
		if err := kid.node.field(m, fd); err != nil {
			return fmt.Errorf("%s: %w", fd.Name(), err)
		}
	}
	return nil
}

func (n *queryNode) field(m protoreflect.Message, fd protoreflect.FieldDescriptor) error {
	switch {
	case fd.IsMap():
		return n.mapField(m.Mutable(fd).Map(), fd)
	case fd.IsList():
		return n.listField(m.Mutable(fd).List(), fd)
	case fd.HasPresence() && n.absent():
		return nil
	}
	v, err := n.value(fd, func() protoreflect.Value { return m.NewField(fd) })
	if err != nil {
		return err
	}
	m.Set(fd, v)
	return nil
}

func (n *queryNode) listField(list protoreflect.List, fd protoreflect.FieldDescriptor) error {
	type element struct {
		at   uint64
		node *queryNode
	}
	var all []element
	for _, v := range n.values {
		all = append(all, element{math.MaxUint64, &queryNode{values: []string{v}}})
	}
	for _, kid := range n.order {
		at := uint64(math.MaxUint64) // unnamed elements follow the numbered
		if kid.name != "" {
			var err error
			if at, err = strconv.ParseUint(kid.name, 10, 32); err != nil {
				return errors.New("expected an index in brackets")
			}
		}
		all = append(all, element{at, kid.node})
	}
	slices.SortStableFunc(all, func(x, y element) int {
		if x.at < y.at {
			return -1
		}
		if x.at > y.at {
			return 1
		}
		return 0
	})
	for i, e := range all {
		v, err := e.node.value(fd, list.NewElement)
		if err != nil {
			return fmt.Errorf("[%d]: %w", i, err)
		}
		list.Append(v)
	}
	return nil
}

func (n *queryNode) mapField(m protoreflect.Map, fd protoreflect.FieldDescriptor) error {
	if len(n.values) > 0 {
		return errors.New("expected keys in brackets")
	}
	for _, kid := range n.order {
		k, err := parseScalar(fd.MapKey(), kid.name)
		if err != nil {
			return fmt.Errorf("key: %w", err)
		}
		if m.Has(k.MapKey()) {
			return errors.New("key given twice")
		}
		v, err := kid.node.value(fd.MapValue(), m.NewValue)
		if err != nil {
			return fmt.Errorf("value: %w", err)
		}
		m.Set(k.MapKey(), v)
	}
	return nil
}

func (n *queryNode) value(fd protoreflect.FieldDescriptor, fresh func() protoreflect.Value) (protoreflect.Value, error) {
	if fd.Kind() == protoreflect.MessageKind {
		v := fresh()
		return v, n.message(v.Message())
	}
	switch {
	case len(n.order) > 0:
		return protoreflect.Value{}, errors.New("brackets on a scalar")
	case len(n.values) != 1:
		return protoreflect.Value{}, errors.New("given twice")
	}
	return parseScalar(fd, n.values[0])
}
