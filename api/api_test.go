package api_test

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	gatewaypb "github.com/dstack-gw/dstack-gw/api/gateway"
	guestpb "github.com/dstack-gw/dstack-gw/api/guest"
	prpcpb "github.com/dstack-gw/dstack-gw/api/prpc"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Names, numbers, types and methods are what released software sends. This
// list changes only when the wire format grows; no line may ever change.
func TestWireFormat(t *testing.T) {
	var got strings.Builder
	for _, f := range []protoreflect.FileDescriptor{
		gatewaypb.File_api_gateway_gateway_proto,
		guestpb.File_api_guest_guest_proto,
		prpcpb.File_api_prpc_prpc_proto,
	} {
		for i := range f.Services().Len() {
			s := f.Services().Get(i)
			for j := range s.Methods().Len() {
				m := s.Methods().Get(j)
				fmt.Fprintf(&got, "%s(%s) %s\n", m.FullName(), m.Input().FullName(), m.Output().FullName())
			}
		}
		for i := range f.Messages().Len() {
			m := f.Messages().Get(i)
			for j := range m.Fields().Len() {
				fmt.Fprintf(&got, "%s\n", field(m.Fields().Get(j)))
			}
		}
	}
	want, err := os.ReadFile("testdata/wire.txt")
	if err != nil {
		t.Fatal(err)
	}
	if got.String() == string(want) {
		return
	}
	lines := strings.Split(string(want), "\n")
	for i, line := range strings.Split(got.String(), "\n") {
		if i >= len(lines) || line != lines[i] {
			t.Fatalf("line %d of testdata/wire.txt: the code says\n%s", i+1, line)
		}
	}
	t.Fatal("testdata/wire.txt lists more than the code")
}

func field(fd protoreflect.FieldDescriptor) string {
	kind := fd.Kind().String()
	switch {
	case fd.IsMap():
		kind = fmt.Sprintf("map<%s,%s>", fd.MapKey().Kind(), fd.MapValue().Kind())
	case fd.Message() != nil:
		kind = string(fd.Message().FullName())
	}
	switch {
	case fd.IsList():
		kind = "repeated " + kind
	case fd.HasOptionalKeyword():
		kind = "optional " + kind
	}
	return fmt.Sprintf("%s %d %s %s", fd.Parent().FullName(), fd.Number(), fd.Name(), kind)
}

// The committed code is what the .proto files give.
func TestGenerated(t *testing.T) {
	if _, err := exec.LookPath("protoc"); err != nil {
		t.Skip("protoc is not installed (package protobuf-compiler); CI compares")
	}
	out := t.TempDir()
	if text, err := exec.Command("./generate.sh", out).CombinedOutput(); err != nil {
		t.Fatalf("generate.sh: %v\n%s", err, text)
	}
	fresh, committed := generated(t, filepath.Join(out, "api")), generated(t, ".")
	if len(fresh) == 0 {
		t.Fatal("nothing was generated")
	}
	for name, code := range fresh {
		if !bytes.Equal(withoutVersions(code), withoutVersions(committed[name])) {
			t.Errorf("%s is not what its .proto gives: run go generate ./api", name)
		}
	}
	for name := range committed {
		if fresh[name] == nil {
			t.Errorf("%s belongs to no .proto", name)
		}
	}
}

func generated(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	files := make(map[string][]byte)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".pb.go") {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		files[name], err = os.ReadFile(path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// withoutVersions drops the header, which names the versions of the tools.
func withoutVersions(code []byte) []byte {
	if i := bytes.Index(code, []byte("\npackage ")); i >= 0 {
		return code[i:]
	}
	return code
}
