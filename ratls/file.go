package ratls

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// WriteFile replaces a file with mode 0600. A reader sees the old content or the
// new, never a part, and after a power failure one of them is there: the data
// is written beside it, synced and renamed into place, then the directory is
// synced. The directory must exist.
func WriteFile(path string, data []byte) error {
	tmp, err := writeTemp(path, data)
	if err == nil {
		if err = os.Rename(tmp, path); err == nil {
			err = syncDir(filepath.Dir(path))
		} else {
			err = errors.Join(err, os.Remove(tmp))
		}
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// writeTemp leaves no file behind when it fails.
func writeTemp(path string, data []byte) (string, error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*") // mode 0600
	if err != nil {
		return "", err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return "", errors.Join(err, os.Remove(f.Name()))
	}
	return f.Name(), nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
