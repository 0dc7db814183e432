package ratls

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// rep is n times the byte written in hex.
func rep(hexByte string, n int) string { return strings.Repeat(hexByte, n) }

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func fill(c byte) (h [32]byte) {
	for i := range h {
		h[i] = c
	}
	return h
}

// sample is the app info of KMS spec B.4.
func sample() *AppInfo {
	return &AppInfo{
		AppID:           bytes.Repeat([]byte{0x11}, 20),
		ComposeHash:     bytes.Repeat([]byte{0x22}, 32),
		InstanceID:      bytes.Repeat([]byte{0x33}, 20),
		DeviceID:        bytes.Repeat([]byte{0x44}, 32),
		MRSystem:        fill(0x55),
		MRAggregated:    fill(0x66),
		OSImageHash:     bytes.Repeat([]byte{0x77}, 32),
		KeyProviderInfo: []byte("{}"),
	}
}

// sampleHex is the same without the first byte.
func sampleHex() string {
	return "c414" + rep("11", 20) + "c420" + rep("22", 32) + "c414" + rep("33", 20) + "c420" + rep("44", 32) +
		"c420" + rep("55", 32) + "c420" + rep("66", 32) + "c420" + rep("77", 32) + "c4027b7d"
}

func TestAppInfoEncode(t *testing.T) {
	withHashes := func(h [][32]byte) *AppInfo {
		a := sample()
		a.InitScriptHashes = h
		return a
	}
	for _, tt := range []struct {
		name string
		info *AppInfo
		want string
	}{
		{"eight elements", sample(), "98" + sampleHex()},
		{"an empty list needs no ninth", withHashes([][32]byte{}), "98" + sampleHex()},
		{"one hash", withHashes([][32]byte{fill(0x88)}), "99" + sampleHex() + "91c420" + rep("88", 32)},
		{"nothing known", &AppInfo{}, "98c400c400c400c400c420" + rep("00", 32) + "c420" + rep("00", 32) + "c400c400"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := tt.info.Encode()
			if hex.EncodeToString(got) != tt.want {
				t.Errorf("got  %x\nwant %s", got, tt.want)
			}
		})
	}
	for _, n := range []int{0xff, 0x100, 0xffff - 1000, 60000} {
		a := sample()
		a.KeyProviderInfo = bytes.Repeat([]byte("x"), n)
		got, err := DecodeAppInfo(a.Encode())
		if err != nil || !bytes.Equal(got.KeyProviderInfo, a.KeyProviderInfo) {
			t.Errorf("%d bytes do not survive: %v", n, err)
		}
	}
}

func TestAppInfoDecode(t *testing.T) {
	none, one := sample(), sample()
	none.InitScriptHashes = [][32]byte{}
	one.InitScriptHashes = [][32]byte{fill(0x88)}
	str := func(s string) string { return fmt.Sprintf("%02x%x", 0xa0|len(s), s) }
	// The fields in map form, in an order of their own.
	asMap := str("key_provider_info") + "c4027b7d" + str("app_id") + "c414" + rep("11", 20) +
		"d90c" + hex.EncodeToString([]byte("compose_hash")) + "c420" + rep("22", 32) +
		str("instance_id") + "c414" + rep("33", 20) + str("device_id") + "c420" + rep("44", 32) +
		str("mr_system") + "c420" + rep("55", 32) + "da000d" + hex.EncodeToString([]byte("mr_aggregated")) + "c420" + rep("66", 32) +
		"db0000000d" + hex.EncodeToString([]byte("os_image_hash")) + "c420" + rep("77", 32)
	// One value of every type that exists.
	everything := []string{
		"00", "7f", "e0", "ff", "c0", "c2", "c3", "cc80", "cd0100", "ce00010000", "cf0000000100000000",
		"d0ff", "d1ff00", "d2ffff0000", "d3ffffffff00000000", "ca00000000", "cb0000000000000000",
		"a0", "a178", "d90178", "da000178", "db0000000178", "c40178", "c5000178", "c60000000178",
		"90", "9101", "dc000101", "dd0000000101", "80", "810102", "de00010102", "df000000010102",
		"d401ff", "d501ffff", "d601ffffffff", "d701" + rep("ff", 8), "d801" + rep("ff", 16),
		"c70101ff", "c8000101ff", "c90000000101ff",
	}
	for _, tt := range []struct {
		name string
		in   string
		want *AppInfo
	}{
		{"eight elements", "98" + sampleHex(), sample()},
		{"nine, nil", "99" + sampleHex() + "c0", sample()},
		{"nine, empty list", "99" + sampleHex() + "90", none},
		{"nine, one hash", "99" + sampleHex() + "91c420" + rep("88", 32), one},
		{"ten", "9a" + sampleHex() + "c0" + "c2", sample()},
		{"long form of the array", "dc0008" + sampleHex(), sample()},
		{"longest form of the array", "dd00000008" + sampleHex(), sample()},
		{"later elements of every type", fmt.Sprintf("dc%04x", 9+len(everything)) + sampleHex() + "c0" + strings.Join(everything, ""), sample()},
		{"bytes as integers", "98" + strings.Replace(sampleHex(), "c4027b7d", "927bcc7d", 1), sample()},
		{"bytes as long", "98" + strings.Replace(sampleHex(), "c4027b7d", "c600000002"+"7b7d", 1), sample()},
		{"map", "88" + asMap, sample()},
		{"map, long form", "de0008" + asMap, sample()},
		{"map, longest form", "df00000008" + asMap, sample()},
		{"map with hashes", "89" + asMap + "b2" + hex.EncodeToString([]byte("init_script_hashes")) + "91c420" + rep("88", 32), one},
		{"map with unknown names, twice too", "8a" + asMap + "a178" + "920102" + "a178" + "c0", sample()},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := DecodeAppInfo(unhex(t, tt.in))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
	// Every proper prefix is an error, also of what is skipped.
	whole := unhex(t, fmt.Sprintf("dc%04x", 9+len(everything))+sampleHex()+"c0"+strings.Join(everything, ""))
	for i := range whole {
		if _, err := DecodeAppInfo(whole[:i]); err == nil {
			t.Errorf("%d of %d bytes were accepted", i, len(whole))
		}
	}
}

func TestAppInfoDecodeErrors(t *testing.T) {
	for _, tt := range []struct{ name, in, text string }{
		{"nothing", "", "truncated"},
		{"another type", "c0", "want an array or a map"},
		{"seven elements", "97" + sampleHex(), "7 elements, want at least 8"},
		{"data behind", "98" + sampleHex() + "00", "data behind the value"},
		{"short measurement", "98" + strings.Replace(sampleHex(), "c420"+rep("55", 32), "c41f"+rep("55", 31), 1), "mr_system: has 31 bytes"},
		{"string for bytes", "98" + strings.Replace(sampleHex(), "c4027b7d", "a27b7d", 1), "key_provider_info: want bytes"},
		{"nil for bytes", "98" + strings.Replace(sampleHex(), "c4027b7d", "c0", 1), "key_provider_info: want bytes"},
		{"no byte among integers", "98" + strings.Replace(sampleHex(), "c4027b7d", "92cd00017d", 1), "not a byte"},
		{"six hashes", "99" + sampleHex() + "96" + rep("c420"+rep("88", 32), 6), "6 hashes, at most 5"},
		{"hashes in a map", "99" + sampleHex() + "80", "want an array"},
		{"short hash", "99" + sampleHex() + "91c40188", "has 1 bytes"},
		{"claimed hashes", "99" + sampleHex() + "ddffffffff", "at most 5"},
		{"claimed elements", "ddffffffff" + sampleHex(), "truncated"},
		{"claimed bytes", "98c6ffffffff00", "app_id: truncated"},
		{"claimed integers", "98ddffffffff00", "app_id: truncated"},
		{"claimed members", "dfffffffff", "truncated"},
		{"claimed name", "81dbffffffff00", "truncated"},
		{"name no string", "8101", "want a string"},
		{"member missing", "80", "app_id: missing"},
		{"member twice", "82a66170705f6964c400a66170705f6964c400", "app_id: given twice"},
		{"reserved type", "9a" + sampleHex() + "c0c1", "0xc1"},
		{"deep", "9a" + sampleHex() + "c0" + rep("91", 100) + "00", "nested deeper"},
		{"claimed skip", "9a" + sampleHex() + "c0dfffffffff", "truncated"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := DecodeAppInfo(unhex(t, tt.in))
			if err == nil || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("got %v, want an error with %q", err, tt.text)
			}
		})
	}
	if _, err := DecodeAppInfo(make([]byte, maxAppInfo+1)); err == nil || !strings.Contains(err.Error(), "65537 bytes") {
		t.Errorf("oversize: %v", err)
	}
}

// The vector of gateway spec B.6, wrapped as a certificate has it.
func TestAppInfoGatewayVector(t *testing.T) {
	a := &AppInfo{
		AppID:           unhex(t, "8f2a7c1d3e4b5a69788796a5b4c3d2e1f0011223"),
		ComposeHash:     bytes.Repeat([]byte{0xab}, 32),
		InstanceID:      bytes.Repeat([]byte{1}, 20),
		DeviceID:        bytes.Repeat([]byte{2}, 32),
		MRSystem:        fill(3),
		MRAggregated:    fill(4),
		OSImageHash:     bytes.Repeat([]byte{5}, 32),
		KeyProviderInfo: []byte("{}"),
	}
	body := "c4148f2a7c1d3e4b5a69788796a5b4c3d2e1f0011223" + "c420" + rep("ab", 32) + "c414" + rep("01", 20) +
		"c420" + rep("02", 32) + "c420" + rep("03", 32) + "c420" + rep("04", 32) + "c420" + rep("05", 32) + "c4027b7d"
	if got := hex.EncodeToString(ExtAppInfo.Encode(a.Encode()).Value); got != "0481db98"+body {
		t.Errorf("got %s", got)
	}
	p, err := unwrap(unhex(t, "0481dc99"+body+"c0"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := DecodeAppInfo(p)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(a, got); diff != "" {
		t.Error(diff)
	}
}

func TestAppInfoJSON(t *testing.T) {
	const head = `{"app_id":"1111111111111111111111111111111111111111",` +
		`"compose_hash":"2222222222222222222222222222222222222222222222222222222222222222",` +
		`"instance_id":"3333333333333333333333333333333333333333",` +
		`"device_id":"4444444444444444444444444444444444444444444444444444444444444444",` +
		`"mr_system":"5555555555555555555555555555555555555555555555555555555555555555",` +
		`"mr_aggregated":"6666666666666666666666666666666666666666666666666666666666666666",` +
		`"os_image_hash":"7777777777777777777777777777777777777777777777777777777777777777",` +
		`"key_provider_info":"7b7d","init_script_hashes":`
	for _, tt := range []struct {
		hashes [][32]byte
		want   string
	}{
		{nil, "null}"},
		{[][32]byte{}, "[]}"},
		{[][32]byte{fill(0x88)}, `["` + rep("88", 32) + `"]}`},
	} {
		a := sample()
		a.InitScriptHashes = tt.hashes
		got, err := json.Marshal(a)
		if err != nil {
			t.Fatal(err)
		}
		if string(got) != head+tt.want {
			t.Errorf("got %s", got)
		}
	}
}

func FuzzDecodeAppInfo(f *testing.F) {
	f.Add(sample().Encode())
	f.Add(unhex(f, "99"+sampleHex()+"91c420"+rep("88", 32)))
	f.Add(unhex(f, "9a"+sampleHex()+"c081a17892c0d401ff"))
	f.Add(unhex(f, "82a66170705f6964c400a6646576696365c0"))
	f.Fuzz(func(t *testing.T, data []byte) {
		a, err := DecodeAppInfo(data)
		if err != nil {
			return
		}
		again, err := DecodeAppInfo(a.Encode())
		if err != nil {
			t.Fatalf("refused its own encoding: %v", err)
		}
		if a.InitScriptHashes != nil && len(a.InitScriptHashes) == 0 {
			a.InitScriptHashes = nil // the one thing that eight elements do not carry
		}
		if diff := cmp.Diff(a, again); diff != "" {
			t.Fatal(diff)
		}
	})
}
