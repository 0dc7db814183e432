package prpc

import (
	"fmt"
	"slices"

	prpcpb "github.com/dstack-gw/dstack-gw/api/prpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
)

// maxDepth bounds how deep an input may nest, in every encoding.
const maxDepth = 64

const emptyName protoreflect.FullName = "google.protobuf.Empty"

// checkMapping reports what of a message type cannot be carried. The interfaces
// of these services use neither groups nor oneofs, and no released client
// defines how they would look in JSON.
func checkMapping(md protoreflect.MessageDescriptor, above []protoreflect.FullName) error {
	if slices.Contains(above, md.FullName()) {
		return nil
	}
	above = append(above, md.FullName())
	fields := md.Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		if fd.Kind() == protoreflect.GroupKind {
			return fmt.Errorf("%s: groups have no JSON mapping", fd.FullName())
		}
		if o := fd.ContainingOneof(); o != nil && !o.IsSynthetic() {
			return fmt.Errorf("%s: oneofs have no JSON mapping", fd.FullName())
		}
		if sub := fd.Message(); sub != nil {
			if err := checkMapping(sub, above); err != nil {
				return err
			}
		}
	}
	return nil
}

// omitEmpty tells whether the .proto asks to leave the field out when empty.
func omitEmpty(fd protoreflect.FieldDescriptor) bool {
	opts, _ := fd.Options().(*descriptorpb.FieldOptions)
	if opts == nil {
		return false
	}
	return proto.GetExtension(opts, prpcpb.E_JsonOmitEmpty).(bool)
}
