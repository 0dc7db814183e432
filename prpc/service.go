package prpc

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/emptypb"
)

// Service is a table of methods. Fill it with Handle, then mount Handler; it
// must not be changed after that.
type Service struct {
	name     string
	prefixes []string
	methods  map[string]*method
}

type method struct {
	name string
	// input makes an empty request; nil when the method takes Empty.
	input func() proto.Message
	call  func(context.Context, proto.Message) (proto.Message, error)
}

// NewService makes an empty service. The name appears in logs only.
//
// Each prefix is removed from the method segment for as long as it matches:
// with "Tproxy." both Tproxy.Info and Tproxy.Tproxy.Info mean Info. A prefix is
// given with its dot; an empty one panics.
func NewService(name string, prefixes ...string) *Service {
	if slices.Contains(prefixes, "") {
		panic(fmt.Sprintf("prpc: service %s: empty method prefix", name))
	}
	return &Service{name: name, prefixes: prefixes, methods: make(map[string]*method)}
}

// Handle adds a method. Names are case-sensitive.
//
// A Req of *emptypb.Empty means that the body of the request is ignored,
// whatever it holds; a Resp of *emptypb.Empty is answered as JSON null or zero
// bytes. The text of an error that fn returns is sent to the caller verbatim:
// wrap causes with ": " and keep secrets out.
//
// A second handler of a name and a message that the JSON mapping cannot carry
// (groups, oneofs) are programming errors and panic.
func Handle[Req, Resp proto.Message](s *Service, name string, fn func(ctx context.Context, req Req) (Resp, error)) {
	if _, taken := s.methods[name]; taken {
		panic(fmt.Sprintf("prpc: service %s: method %s registered twice", s.name, name))
	}
	var (
		req  Req
		resp Resp
	)
	in := req.ProtoReflect().Type()
	for _, d := range []protoreflect.MessageDescriptor{in.Descriptor(), resp.ProtoReflect().Descriptor()} {
		if err := checkMapping(d, nil); err != nil {
			panic(fmt.Sprintf("prpc: service %s: method %s: %v", s.name, name, err))
		}
	}
	m := &method{
		name: name,
		call: func(ctx context.Context, msg proto.Message) (proto.Message, error) {
			// The input was made by this method, so it is a Req.
			return fn(ctx, msg.(Req))
		},
	}
	if in.Descriptor().FullName() != emptyName {
		m.input = func() proto.Message { return in.New().Interface() }
	}
	s.methods[name] = m
}

// Methods lists the names that have a handler, sorted.
func (s *Service) Methods() []string {
	names := make([]string, 0, len(s.methods))
	for name := range s.methods {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// bare removes the service's prefixes from a method segment.
func (s *Service) bare(segment string) string {
	for {
		n := len(segment)
		for _, p := range s.prefixes {
			segment = strings.TrimPrefix(segment, p)
		}
		if len(segment) == n {
			return segment
		}
	}
}

// decode makes the request message of m from body, or from query for a GET.
func (m *method) decode(body []byte, query string, get, json bool) (proto.Message, error) {
	if m.input == nil {
		return &emptypb.Empty{}, nil
	}
	msg := m.input()
	switch {
	case get:
		if err := UnmarshalQuery(query, msg); err != nil {
			return nil, fmt.Errorf("failed to decode query of %s: %w", m.name, err)
		}
	case len(body) == 0:
		// No body is the message with every field at its default.
	case json:
		if err := Unmarshal(body, msg); err != nil {
			return nil, fmt.Errorf("failed to decode JSON of %s: %w", m.name, err)
		}
	default:
		// Requests are shallow; the limit keeps hostile nesting off the stack.
		opts := proto.UnmarshalOptions{DiscardUnknown: true, RecursionLimit: maxDepth}
		if err := opts.Unmarshal(body, msg); err != nil {
			return nil, fmt.Errorf("failed to decode protobuf of %s: %w", m.name, err)
		}
	}
	return msg, nil
}
