package prpc

import (
	"encoding/json"
	"math"
	"strings"
	"testing"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
	guestpb "github.com/dstack-gw/dstack-gw/api/guest"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/typepb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func TestMarshal(t *testing.T) {
	tests := []struct {
		name string
		msg  proto.Message
		want string
	}{
		{"empty", &emptypb.Empty{}, `null`},
		{
			"absent message and optional are null",
			&gatewaypb.RegisterCvmRequest{},
			`{"client_public_key":"","port_policy":null}`,
		},
		{
			"present and empty message",
			&gatewaypb.RegisterCvmRequest{PortPolicy: &gatewaypb.PortPolicy{}},
			`{"client_public_key":"","port_policy":{"ports":[],"restrict_mode":false}}`,
		},
		{
			"specification's request",
			registerRequest(),
			`{"client_public_key":"AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=","port_policy":` +
				`{"ports":[{"port":443,"pp":true},{"port":8080,"pp":false}],"restrict_mode":true}}`,
		},
		{
			"bytes are lower-case hex",
			&gatewaypb.GatewayNodeInfo{Uuid: []byte{0xAB, 0x00, 0x1f}},
			`{"id":0,"uuid":"ab001f","url":"","last_seen":0,"wg_public_key":"","wg_ip":"","wg_endpoint":""}`,
		},
		{
			"64-bit integers are numbers",
			&gatewaypb.LastSeenEntry{NodeId: math.MaxUint32, Timestamp: math.MaxUint64},
			`{"node_id":4294967295,"timestamp":18446744073709551615}`,
		},
		{
			"map keys sorted as numbers",
			&gatewaypb.GlobalConnectionsStats{TotalConnections: 6, NodeConnections: map[uint32]uint64{10: 1, 9: 2, 100: 3}},
			`{"total_connections":6,"node_connections":{"9":2,"10":1,"100":3}}`,
		},
		{
			"no map is an empty object",
			&gatewaypb.GlobalConnectionsStats{},
			`{"total_connections":0,"node_connections":{}}`,
		},
		{
			"present optionals keep their zero",
			&gatewaypb.ZtDomainConfig{Domain: "d", DnsCredId: proto.String(""), Node: proto.Uint32(0), Priority: -5},
			`{"domain":"d","dns_cred_id":"","port":0,"node":0,"priority":-5}`,
		},
		{
			"omitted when empty, as the .proto asks",
			&guestpb.GetQuoteResponse{Quote: []byte{1}},
			`{"quote":"01","event_log":"","report_data":"","vm_config":""}`,
		},
		{
			"the same when not empty",
			&guestpb.GetQuoteResponse{Attestation: []byte{2}},
			`{"quote":"","event_log":"","report_data":"","vm_config":"","attestation":"02"}`,
		},
		{"escapes", wrapperspb.String("\"\\/\b\f\n\r\t\x00\x1f\x7f<&>é\u2028😀\xff"), `{"value":"\"\\/\b\f\n\r\t\u0000\u001f` + "\x7f" + `<&>\u00e9\u2028\ud83d\ude00\ufffd"}`},
		{
			"enum is a number",
			&typepb.Field{Kind: typepb.Field_TYPE_BOOL},
			`{"kind":8,"cardinality":0,"number":0,"name":"","type_url":"","oneof_index":0,"packed":false,` +
				`"options":[],"json_name":"","default_value":""}`,
		},
		{"floating point", wrapperspb.Double(1.5), `{"value":1.5}`},
		{"not a number", wrapperspb.Float(float32(math.Inf(1))), `{"value":null}`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Marshal(tt.msg)
			if err != nil {
				t.Fatal(err)
			}
			if string(got) != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
			if !json.Valid(got) {
				t.Error("not JSON")
			}
		})
	}
	if _, err := Marshal(&structpb.Value{}); err == nil {
		t.Error("a message with a oneof was encoded")
	}
}

func registerRequest() *gatewaypb.RegisterCvmRequest {
	return &gatewaypb.RegisterCvmRequest{
		ClientPublicKey: "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=",
		PortPolicy: &gatewaypb.PortPolicy{
			Ports:        []*gatewaypb.PortAttrs{{Port: 443, Pp: true}, {Port: 8080}},
			RestrictMode: true,
		},
	}
}

func TestUnmarshal(t *testing.T) {
	tests := []struct {
		name string
		in   string
		want proto.Message
	}{
		{"missing fields", `{}`, &gatewaypb.RegisterCvmRequest{}},
		{"null message", `{"port_policy":null}`, &gatewaypb.RegisterCvmRequest{}},
		{"empty message", `{"port_policy":{}}`, &gatewaypb.RegisterCvmRequest{PortPolicy: &gatewaypb.PortPolicy{}}},
		{"null optional", `{"dns_cred_id":null,"node":null}`, &gatewaypb.ZtDomainConfig{}},
		{"zero optional", `{"dns_cred_id":"","node":0}`, &gatewaypb.ZtDomainConfig{DnsCredId: proto.String(""), Node: proto.Uint32(0)}},
		{"negative where signed", `{"priority":-2147483648}`, &gatewaypb.ZtDomainConfig{Priority: math.MinInt32}},
		{"unknown fields of every type", `{"a":[1,{"b":null},[[]],"x\ud83d\ude00"],"c":true,"d":-1.5e+3,"domain":"x","e":{},"f":false}`, &gatewaypb.ZtDomainConfig{Domain: "x"}},
		{"unknown field twice", `{"a":1,"a":2}`, &gatewaypb.ZtDomainConfig{}},
		{"white space", " \t\r\n{ \"domain\" : \"x\" , \"port\" : 1 } \n", &gatewaypb.ZtDomainConfig{Domain: "x", Port: 1}},
		{"any order", `{"restrict_mode":true,"ports":[{"pp":true,"port":1},{}]}`, &gatewaypb.PortPolicy{RestrictMode: true, Ports: []*gatewaypb.PortAttrs{{Port: 1, Pp: true}, {}}}},
		{"hex", `{"report_data":"0x0x00fFAb"}`, &guestpb.RawQuoteArgs{ReportData: []byte{0, 0xff, 0xab}}},
		{"no hex", `{"report_data":"0x"}`, &guestpb.RawQuoteArgs{}},
		{"largest", `{"node_id":4294967295,"timestamp":18446744073709551615}`, &gatewaypb.LastSeenEntry{NodeId: math.MaxUint32, Timestamp: math.MaxUint64}},
		{"map", `{"node_connections":{"9":2,"10":1}}`, &gatewaypb.GlobalConnectionsStats{NodeConnections: map[uint32]uint64{9: 2, 10: 1}}},
		{"escapes", `{"domain":"\"\\\/\b\f\n\r\t\u0041\u00e9\ud83d\ude00é"}`, &gatewaypb.ZtDomainConfig{Domain: "\"\\/\b\f\n\r\tAé😀é"}},
		{"escaped name", `{"d\u006fmain":"x"}`, &gatewaypb.ZtDomainConfig{Domain: "x"}},
		{"enum", `{"kind":8}`, &typepb.Field{Kind: typepb.Field_TYPE_BOOL}},
		{"floating point", `{"value":-0.5e1}`, wrapperspb.Double(-5)},
		{"empty takes anything", `no JSON`, &emptypb.Empty{}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := tt.want.ProtoReflect().New().Interface()
			if err := Unmarshal([]byte(tt.in), got); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got, protocmp.Transform()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestUnmarshalErrors(t *testing.T) {
	deep := strings.Repeat(`[`, 100) + strings.Repeat(`]`, 100)
	tests := []struct {
		name string
		in   string
		msg  proto.Message
		text string
	}{
		{"nothing", ``, &gatewaypb.ZtDomainConfig{}, "expected an object, found the end"},
		{"null", `null`, &gatewaypb.ZtDomainConfig{}, "found null"},
		{"array", `[]`, &gatewaypb.ZtDomainConfig{}, "found an array"},
		{"trailing", `{}{}`, &gatewaypb.ZtDomainConfig{}, "behind the object"},
		{"null scalar", `{"port":null}`, &gatewaypb.ZtDomainConfig{}, "port: expected a number, found null"},
		{"null string", `{"domain":null}`, &gatewaypb.ZtDomainConfig{}, "domain: expected a string"},
		{"null bool", `{"pp":null}`, &gatewaypb.PortAttrs{}, "pp: expected a boolean"},
		{"null repeated", `{"ports":null}`, &gatewaypb.PortPolicy{}, "ports: expected an array"},
		{"null element", `{"ports":[null]}`, &gatewaypb.PortPolicy{}, "ports: [0]: expected an object"},
		{"null map", `{"node_connections":null}`, &gatewaypb.GlobalConnectionsStats{}, "expected an object"},
		{"negative", `{"port":-1}`, &gatewaypb.ZtDomainConfig{}, "out of range"},
		{"too large", `{"port":4294967296}`, &gatewaypb.ZtDomainConfig{}, "out of range"},
		{"too large 64", `{"timestamp":18446744073709551616}`, &gatewaypb.LastSeenEntry{}, "out of range"},
		{"fraction", `{"port":1.0}`, &gatewaypb.ZtDomainConfig{}, "not an integer"},
		{"exponent", `{"port":1e0}`, &gatewaypb.ZtDomainConfig{}, "not an integer"},
		{"minus zero", `{"port":-0}`, &gatewaypb.ZtDomainConfig{}, "not an integer"},
		{"number in quotes", `{"port":"1"}`, &gatewaypb.ZtDomainConfig{}, "found a string"},
		{"leading zero", `{"port":01}`, &gatewaypb.ZtDomainConfig{}, "expected a comma"},
		{"plus", `{"port":+1}`, &gatewaypb.ZtDomainConfig{}, "expected a number"},
		{"lone minus", `{"x":-}`, &gatewaypb.ZtDomainConfig{}, "malformed number"},
		{"open fraction", `{"x":1.}`, &gatewaypb.ZtDomainConfig{}, "malformed number"},
		{"open exponent", `{"x":1e+}`, &gatewaypb.ZtDomainConfig{}, "malformed number"},
		{"boolean for string", `{"domain":true}`, &gatewaypb.ZtDomainConfig{}, "found a boolean"},
		{"number for boolean", `{"pp":1}`, &gatewaypb.PortAttrs{}, "found a number"},
		{"odd hex", `{"report_data":"0x123"}`, &guestpb.RawQuoteArgs{}, "hexadecimal"},
		{"no hex", `{"report_data":"zz"}`, &guestpb.RawQuoteArgs{}, "hexadecimal"},
		{"upper-case prefix", `{"report_data":"0X12"}`, &guestpb.RawQuoteArgs{}, "hexadecimal"},
		{"field twice", `{"port":1,"port":1}`, &gatewaypb.ZtDomainConfig{}, "given twice"},
		{"map key twice", `{"node_connections":{"1":1,"1":2}}`, &gatewaypb.GlobalConnectionsStats{}, "given twice"},
		{"map key no number", `{"node_connections":{"x":1}}`, &gatewaypb.GlobalConnectionsStats{}, "not a number"},
		{"path of an error", `{"port_policy":{"ports":[{},{"port":"x"}]}}`, &gatewaypb.RegisterCvmRequest{}, "port_policy: ports: [1]: port: expected a number, found a string at byte 36"},
		{"depth", `{"x":` + deep + `}`, &gatewaypb.ZtDomainConfig{}, "nested deeper"},
		{"control character", "{\"domain\":\"\n\"}", &gatewaypb.ZtDomainConfig{}, "control character"},
		{"invalid UTF-8", "{\"domain\":\"\xff\"}", &gatewaypb.ZtDomainConfig{}, "UTF-8"},
		{"invalid UTF-8 skipped", "{\"x\":\"\xff\"}", &gatewaypb.ZtDomainConfig{}, "UTF-8"},
		{"high surrogate alone", `{"domain":"\ud83d"}`, &gatewaypb.ZtDomainConfig{}, "surrogate"},
		{"high surrogate twice", `{"domain":"\ud83d\ud83d"}`, &gatewaypb.ZtDomainConfig{}, "surrogate"},
		{"low surrogate", `{"domain":"\ude00"}`, &gatewaypb.ZtDomainConfig{}, "surrogate"},
		{"unknown escape", `{"domain":"\x"}`, &gatewaypb.ZtDomainConfig{}, "escape"},
		{"NUL escape", "{\"domain\":\"\\\x00\"}", &gatewaypb.ZtDomainConfig{}, "escape"},
		{"short escape", `{"domain":"\u00`, &gatewaypb.ZtDomainConfig{}, "escape"},
		{"unterminated", `{"domain":"x`, &gatewaypb.ZtDomainConfig{}, "unterminated"},
		{"trailing comma", `{"port":1,}`, &gatewaypb.ZtDomainConfig{}, "member name"},
		{"trailing comma in array", `{"ports":[{},]}`, &gatewaypb.PortPolicy{}, "found something that is not JSON"},
		{"no colon", `{"port" 1}`, &gatewaypb.ZtDomainConfig{}, "colon"},
		{"bare word", `{"x":nul}`, &gatewaypb.ZtDomainConfig{}, "expected a value"},
		{"word runs on", `{"x":truely}`, &gatewaypb.ZtDomainConfig{}, "expected a comma"},
		{"oneof", `{}`, &structpb.Value{}, "oneofs"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := Unmarshal([]byte(tt.in), tt.msg)
			if err == nil || !strings.Contains(err.Error(), tt.text) {
				t.Fatalf("got %v, want an error with %q", err, tt.text)
			}
		})
	}
}

// A field beyond the 64th takes the slow way of the duplicate check.
func TestFieldSet(t *testing.T) {
	var s fieldSet
	for _, i := range []int{0, 63, 64, 500} {
		if !s.add(i) {
			t.Errorf("field %d was new", i)
		}
		if s.add(i) {
			t.Errorf("field %d was seen", i)
		}
	}
}

func TestUnmarshalQuery(t *testing.T) {
	policy := &gatewaypb.PortPolicy{
		Ports:        []*gatewaypb.PortAttrs{{Port: 443, Pp: true}, {Port: 8080}},
		RestrictMode: true,
	}
	tests := []struct {
		name string
		in   string
		want proto.Message
	}{
		{"nothing", "", &gatewaypb.ZtDomainConfig{}},
		{"scalars", "domain=a.b&port=443&priority=-1&node=0", &gatewaypb.ZtDomainConfig{Domain: "a.b", Port: 443, Priority: -1, Node: proto.Uint32(0)}},
		{"json is ignored", "json&domain=x&json=1", &gatewaypb.ZtDomainConfig{Domain: "x"}},
		{"unknown is ignored", "x[y][z]=1&x=2&domain=x&=3&&[a]=1&domain[=3", &gatewaypb.ZtDomainConfig{Domain: "x"}},
		{"form encoding", "domain=a+b%2Bc%26%3D", &gatewaypb.ZtDomainConfig{Domain: "a b+c&="}},
		{"broken escape stands for itself", "domain=100%", &gatewaypb.ZtDomainConfig{Domain: "100%"}},
		{"equals sign in the value", "client_public_key=AQE=", &gatewaypb.RegisterCvmRequest{ClientPublicKey: "AQE="}},
		{"hex", "report_data=0x1234deadbeef", &guestpb.RawQuoteArgs{ReportData: []byte{0x12, 0x34, 0xde, 0xad, 0xbe, 0xef}}},
		{"nested", "port_policy[ports][1][port]=8080&port_policy[ports][0][port]=443&port_policy[ports][0][pp]=true&port_policy[restrict_mode]=true", &gatewaypb.RegisterCvmRequest{PortPolicy: policy}},
		{"encoded brackets", "port_policy%5Brestrict_mode%5D=true", &gatewaypb.RegisterCvmRequest{PortPolicy: &gatewaypb.PortPolicy{RestrictMode: true}}},
		{"gaps in indices", "alt_names[7]=b&alt_names[10]=c&alt_names[2]=a", &guestpb.GetTlsKeyArgs{AltNames: []string{"a", "b", "c"}}},
		{"unnamed elements", "alt_names[]=a&alt_names[]=b", &guestpb.GetTlsKeyArgs{AltNames: []string{"a", "b"}}},
		{"repeated name", "alt_names=a&alt_names=b", &guestpb.GetTlsKeyArgs{AltNames: []string{"a", "b"}}},
		{"one element", "alt_names=a", &guestpb.GetTlsKeyArgs{AltNames: []string{"a"}}},
		{"empty optional is absent", "dns_cred_id=&node=&domain=", &gatewaypb.ZtDomainConfig{}},
		{"empty message is absent", "port_policy", &gatewaypb.RegisterCvmRequest{}},
		{"map", "node_connections[3]=4&node_connections[5]=6", &gatewaypb.GlobalConnectionsStats{NodeConnections: map[uint32]uint64{3: 4, 5: 6}}},
		{"empty takes anything", "%%%", &emptypb.Empty{}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := tt.want.ProtoReflect().New().Interface()
			if err := UnmarshalQuery(tt.in, got); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got, protocmp.Transform()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestUnmarshalQueryErrors(t *testing.T) {
	tests := []struct {
		name string
		in   string
		msg  proto.Message
		text string
	}{
		{"no number", "port=x", &gatewaypb.ZtDomainConfig{}, "port: not a number"},
		{"no value", "port", &gatewaypb.ZtDomainConfig{}, "port: not a number"},
		{"negative", "port=-1", &gatewaypb.ZtDomainConfig{}, "out of range"},
		{"boolean", "pp=yes", &gatewaypb.PortAttrs{}, "neither true nor false"},
		{"twice", "port=1&port=1", &gatewaypb.ZtDomainConfig{}, "given twice"},
		{"brackets on a scalar", "port[x]=1", &gatewaypb.ZtDomainConfig{}, "brackets on a scalar"},
		{"scalar and brackets", "port=1&port[x]=1", &gatewaypb.ZtDomainConfig{}, "brackets on a scalar"},
		{"value for a message", "port_policy=x", &gatewaypb.RegisterCvmRequest{}, "port_policy: expected members"},
		{"value for an element", "ports[0]=x", &gatewaypb.PortPolicy{}, "ports: [0]: expected members"},
		{"index no number", "ports[x][port]=1", &gatewaypb.PortPolicy{}, "index"},
		{"index too large", "ports[99999999999][port]=1", &gatewaypb.PortPolicy{}, "index"},
		{"invalid UTF-8", "domain=%ff", &gatewaypb.ZtDomainConfig{}, "UTF-8"},
		{"hex", "report_data=abc", &guestpb.RawQuoteArgs{}, "hexadecimal"},
		{"deep", "port_policy" + strings.Repeat("[x]", 9) + "=1", &gatewaypb.RegisterCvmRequest{}, "brackets"},
		{"value for a map", "node_connections=1", &gatewaypb.GlobalConnectionsStats{}, "keys in brackets"},
		{"map key", "node_connections[x]=1", &gatewaypb.GlobalConnectionsStats{}, "key: not a number"},
		{"map key twice", "node_connections[1]=1&node_connections[01]=1", &gatewaypb.GlobalConnectionsStats{}, "key given twice"},
		{"oneof", "", &structpb.Value{}, "oneofs"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := UnmarshalQuery(tt.in, tt.msg)
			if err == nil || !strings.Contains(err.Error(), tt.text) {
				t.Fatalf("got %v, want an error with %q", err, tt.text)
			}
		})
	}
}

// What is accepted is JSON and survives a round trip.
func FuzzUnmarshal(f *testing.F) {
	f.Add([]byte(`{"client_public_key":"AQE=","port_policy":{"ports":[{"port":443,"pp":true}],"restrict_mode":true}}`))
	f.Add([]byte(`{"x":[null,{"y":-1.5e3}],"client_public_key":"\ud83d\ude00","port_policy":null}`))
	f.Add([]byte(`{"node_connections":{"1":2},"uuid":"0xab","hosts":[{"instance_id":"a"}],"accel":{}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, msg := range []proto.Message{
			&gatewaypb.RegisterCvmRequest{}, &gatewaypb.StatusResponse{},
			&gatewaypb.GlobalConnectionsStats{}, &gatewaypb.UpdateDnsCredentialRequest{},
		} {
			if err := Unmarshal(data, msg); err != nil {
				continue
			}
			if !json.Valid(data) {
				t.Fatalf("accepted what is not JSON: %q", data)
			}
			out, err := Marshal(msg)
			if err != nil {
				t.Fatal(err)
			}
			again := msg.ProtoReflect().New().Interface()
			if err := Unmarshal(out, again); err != nil {
				t.Fatalf("refused its own output %s: %v", out, err)
			}
			if !proto.Equal(msg, again) {
				t.Fatalf("changed on the way:\n%v\n%v", msg, again)
			}
		}
	})
}

// What is accepted can be sent in both encodings.
func FuzzUnmarshalQuery(f *testing.F) {
	f.Add("client_public_key=AQE%3D&port_policy[ports][0][port]=443&port_policy[restrict_mode]=true")
	f.Add("port_policy%5Bports%5D[][pp]=true&json&x=1")
	f.Add("id=3&hosts[1][ip]=10.0.0.2&hosts[0][ip]=&uuid=0xab&accel")
	f.Fuzz(func(t *testing.T, raw string) {
		for _, msg := range []proto.Message{&gatewaypb.RegisterCvmRequest{}, &gatewaypb.StatusResponse{}, &gatewaypb.GlobalConnectionsStats{}} {
			if err := UnmarshalQuery(raw, msg); err != nil {
				continue
			}
			if _, err := proto.Marshal(msg); err != nil {
				t.Fatal(err)
			}
			out, err := Marshal(msg)
			if err != nil {
				t.Fatal(err)
			}
			if err := Unmarshal(out, msg.ProtoReflect().New().Interface()); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func BenchmarkMarshalRegisterResponse(b *testing.B) {
	node := &gatewaypb.GatewayNodeInfo{Id: 1, Uuid: make([]byte, 16), Url: "https://gateway.example:8000", LastSeen: 1700000000, WgPublicKey: registerRequest().ClientPublicKey, WgIp: "10.8.0.1/16", WgEndpoint: "192.0.2.1:51820"}
	peer := &gatewaypb.WireGuardPeer{Pk: registerRequest().ClientPublicKey, Ip: "10.8.0.1/16", Endpoint: "192.0.2.1:51820"}
	msg := &gatewaypb.RegisterCvmResponse{
		Wg:       &gatewaypb.WireGuardConfig{ClientIp: "10.8.0.2", Servers: []*gatewaypb.WireGuardPeer{peer, peer, peer}},
		Agent:    &gatewaypb.GuestAgentConfig{ExternalPort: 443, InternalPort: 8090, Domain: "example.org", AppAddressNsPrefix: "_dstack-app-address"},
		Gateways: []*gatewaypb.GatewayNodeInfo{node, node, node},
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Marshal(msg); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkUnmarshalRegisterRequest(b *testing.B) {
	data, err := Marshal(registerRequest())
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		if err := Unmarshal(data, new(gatewaypb.RegisterCvmRequest)); err != nil {
			b.Fatal(err)
		}
	}
}
